#include "python/call_dict.h"

#include <pybind11/stl.h>

#include <cstring>
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
  for (const char* name : {"q", "k", "v", "out", "kv_lengths", "cu_seqlens_q", "cu_seqlens_k"}) {
    if (std::strcmp(key, name) == 0) return true;
  }
  return false;
}

template <class T>
T value_or(const py::dict& dict, const char* key, T otherwise) {
  return given(dict, key) ? dict[key].cast<T>() : otherwise;
}

}  // namespace

TensorDesc CallFromDict::tensor(const py::dict& dict, const char* key) {
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
  const auto layout = value_or<int64_t>(dict, "layout", 0);
  const auto causal = value_or<int64_t>(dict, "causal", 0);
  if (const auto error = set_layout_and_causal(&call_, layout, causal)) throw py::value_error(error->text);
  if (given(dict, "window")) {
    const auto window = dict["window"].cast<py::sequence>();
    call_.window_left = window[0].cast<int64_t>();
    call_.window_right = window[1].cast<int64_t>();
  }
  if (given(dict, "scale")) call_.scale = dict["scale"].cast<double>();
  call_.softcap = value_or<double>(dict, "softcap", 0.0);
  call_.dropout_p = value_or<double>(dict, "dropout_p", 0.0);
  call_.mask_block_q = value_or<int64_t>(dict, "mask_block_q", 1);
  call_.mask_block_kv = value_or<int64_t>(dict, "mask_block_kv", 1);
  call_.max_seqlen_q = value_or<int64_t>(dict, "max_seqlen_q", -1);
  call_.max_seqlen_k = value_or<int64_t>(dict, "max_seqlen_k", -1);
}

}  // namespace fae::python
