#include "python/call_dict.h"

#include <pybind11/stl.h>

#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace fae::python {
namespace {

// Stands for memory whose address was not given: a tensor is then there, but is not read.
char kSomewhere[1];

DType dtype_of(const std::string& name) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64, DType::kBool,
                            DType::kInt32, DType::kInt64}) {
    if (name == name_of(dtype)) return dtype;
  }
  return DType::kOther;
}

bool given(const py::dict& dict, const char* key) { return dict.contains(key) && !dict[key].is_none(); }

// Of these only the values at a given address count; those of all others do not matter here.
bool is_read_by_planners(const char* key) {
  for (const char* name : {"q", "k", "v", "out", "kv_lengths", "cu_seqlens_q", "cu_seqlens_k",
                           "cache_lengths", "block_table", "cache_batch_idx", "cache_leftpad"}) {
    if (std::strcmp(key, name) == 0) return true;
  }
  return false;
}

template <class T>
T value_or(const py::dict& dict, const char* key, T otherwise) {
  return given(dict, key) ? dict[key].cast<T>() : otherwise;
}

// What both kinds of calls have.
template <class Desc>
void read_options(const py::dict& dict, Desc* call) {
  CallDesc checked;
  const auto layout = value_or<int64_t>(dict, "layout", 0);
  const auto causal = value_or<int64_t>(dict, "causal", 0);
  if (const auto error = set_layout_and_causal(&checked, layout, causal)) throw py::value_error(error->text);
  if constexpr (std::is_same_v<Desc, CallDesc>) call->layout = checked.layout;
  call->causal = checked.causal;
  if (given(dict, "window")) {
    const auto window = dict["window"].cast<py::sequence>();
    call->window_left = window[0].cast<int64_t>();
    call->window_right = window[1].cast<int64_t>();
  }
  if (given(dict, "scale")) call->scale = dict["scale"].cast<double>();
  call->softcap = value_or<double>(dict, "softcap", 0.0);
  call->max_seqlen_q = value_or<int64_t>(dict, "max_seqlen_q", -1);
}

}  // namespace

TensorDesc TensorsFromDict::tensor(const py::dict& dict, const char* key) {
  TensorDesc desc;
  if (!given(dict, key)) return desc;
  const auto fields = dict[key].cast<py::tuple>();
  if (fields.size() < 4)
    throw py::value_error(std::string(key) + " is not (shape, stride, dtype, device[, data_ptr])");
  const auto shape = fields[0].cast<py::sequence>();
  const auto stride = fields[1].cast<py::sequence>();
  if (shape.size() != stride.size()) {
    throw py::value_error(std::string(key) + " has shape and stride of different lengths");
  }
  desc.present = true;
  names_.push_back(fields[2].cast<std::string>());
  desc.dtype = dtype_of(names_.back());
  desc.dtype_name = names_.back().c_str();
  names_.push_back(fields[3].cast<std::string>());
  desc.device = names_.back().c_str();
  if (shape.size() > size_t(TensorDesc::kMaxRank)) {
    const auto sizes = fields[0].cast<std::vector<int64_t>>();
    throw py::value_error(too_many_axes(key, sizes.data(), int64_t(sizes.size())).text);
  }
  desc.rank = int(shape.size());
  for (int axis = 0; axis < desc.rank; ++axis) {
    desc.shape[axis] = shape[size_t(axis)].cast<int64_t>();
    desc.stride[axis] = stride[size_t(axis)].cast<int64_t>();
  }
  if (fields.size() > 4) {
    desc.data = reinterpret_cast<void*>(fields[4].cast<uintptr_t>());
  } else if (!is_read_by_planners(key)) {
    desc.data = kSomewhere;
  }
  return desc;
}

CallFromDict::CallFromDict(const py::dict& dict) {
  call_.q = tensor(dict, "q");
  call_.k = tensor(dict, "k");
  call_.v = tensor(dict, "v");
  call_.mask = tensor(dict, "mask");
  call_.bias = tensor(dict, "bias");
  call_.kv_lengths = tensor(dict, "kv_lengths");
  call_.out = tensor(dict, "out");
  call_.alibi_slopes = tensor(dict, "alibi_slopes");
  call_.sinks = tensor(dict, "sinks");
  call_.rng_state = tensor(dict, "rng_state");
  call_.row_labels = tensor(dict, "row_labels");
  call_.key_bounds = tensor(dict, "key_bounds");
  call_.cu_seqlens_q = tensor(dict, "cu_seqlens_q");
  call_.cu_seqlens_k = tensor(dict, "cu_seqlens_k");
  read_options(dict, &call_);
  call_.dropout_p = value_or<double>(dict, "dropout_p", 0.0);
  call_.mask_block_q = value_or<int64_t>(dict, "mask_block_q", 1);
  call_.mask_block_kv = value_or<int64_t>(dict, "mask_block_kv", 1);
  call_.max_seqlen_k = value_or<int64_t>(dict, "max_seqlen_k", -1);
}

CacheCallFromDict::CacheCallFromDict(const py::dict& dict) {
  const std::pair<const char*, TensorDesc*> tensors[] = {
      {"q", &call_.q},
      {"k_cache", &call_.k_cache},
      {"v_cache", &call_.v_cache},
      {"k", &call_.k},
      {"v", &call_.v},
      {"cache_lengths", &call_.cache_lengths},
      {"block_table", &call_.block_table},
      {"cache_batch_idx", &call_.cache_batch_idx},
      {"cache_leftpad", &call_.cache_leftpad},
      {"rotary_cos", &call_.rotary_cos},
      {"rotary_sin", &call_.rotary_sin},
      {"cu_seqlens_q", &call_.cu_seqlens_q},
      {"alibi_slopes", &call_.alibi_slopes},
      {"sinks", &call_.sinks},
  };
  for (const auto& [name, desc] : tensors) *desc = tensor(dict, name);
  call_.cache_length = value_or<int64_t>(dict, "cache_length", 0);
  read_options(dict, &call_);
}

}  // namespace fae::python
