#include "torch/view.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "torch/errors.h"

namespace fae::torch_ops {
namespace {

// The numbers behind dtypes and devices are libtorch's to choose: asked for once.
struct Codes {
  int32_t float16 = aoti_torch_dtype_float16();
  int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t float32 = aoti_torch_dtype_float32();
  int32_t float64 = aoti_torch_dtype_float64();
  int32_t boolean = aoti_torch_dtype_bool();
  int32_t int32 = aoti_torch_dtype_int32();
  int32_t int64 = aoti_torch_dtype_int64();
  int32_t cpu = aoti_torch_device_type_cpu();
  int32_t cuda = aoti_torch_device_type_cuda();
};
const Codes kCodes;

DType dtype_of(int32_t code) {
  if (code == kCodes.float32) return DType::kFloat32;
  if (code == kCodes.bfloat16) return DType::kBFloat16;
  if (code == kCodes.float16) return DType::kFloat16;
  if (code == kCodes.float64) return DType::kFloat64;
  if (code == kCodes.boolean) return DType::kBool;
  if (code == kCodes.int64) return DType::kInt64;
  if (code == kCodes.int32) return DType::kInt32;
  return DType::kOther;
}

int32_t code_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16: return kCodes.float16;
    case DType::kBFloat16: return kCodes.bfloat16;
    case DType::kFloat64: return kCodes.float64;
    default: return kCodes.float32;
  }
}

// Names of the dtypes that no kernel takes, for error texts.
const char* other_dtype_name(int32_t code) {
  if (code == aoti_torch_dtype_uint8()) return "uint8";
  if (code == aoti_torch_dtype_int8()) return "int8";
  if (code == aoti_torch_dtype_int16()) return "int16";
  if (code == aoti_torch_dtype_uint16()) return "uint16";
  if (code == aoti_torch_dtype_uint32()) return "uint32";
  if (code == aoti_torch_dtype_uint64()) return "uint64";
  if (code == aoti_torch_dtype_complex32()) return "complex32";
  if (code == aoti_torch_dtype_complex64()) return "complex64";
  if (code == aoti_torch_dtype_complex128()) return "complex128";
  if (code == aoti_torch_dtype_float8_e4m3fn()) return "float8_e4m3fn";
  if (code == aoti_torch_dtype_float8_e5m2()) return "float8_e5m2";
  return nullptr;
}

// "cuda:1": as torch prints it, for as long as the process lives.
const char* cuda_name(int32_t index) {
  constexpr int32_t kMost = 64;
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (int32_t i = 0; i < kMost; ++i) all.push_back("cuda:" + std::to_string(i));
    return all;
  }();
  return index >= 0 && index < kMost ? names[size_t(index)].c_str() : "cuda";
}

const char* device_name(Place place) {
  const int32_t code = place.type;
  if (code == kCodes.cpu) return "cpu";
  if (code == kCodes.cuda) return cuda_name(place.index);
  if (code == aoti_torch_device_type_meta()) return "meta";
  if (code == aoti_torch_device_type_xpu()) return "xpu";
  if (code == aoti_torch_device_type_mps()) return "mps";
  return "another device";
}

void check(AOTITorchError error) {
  if (error != TORCH_SUCCESS) throw std::runtime_error("flash_attn_ext: torch refused to describe a tensor");
}

bool is_contiguous(const TensorDesc& desc) {
  int64_t expected = 1;
  for (int axis = desc.rank - 1; axis >= 0; --axis) {
    if (desc.shape[axis] == 0) return true;
    if (desc.shape[axis] != 1 && desc.stride[axis] != expected) return false;
    expected *= desc.shape[axis];
  }
  return true;
}

// Sorts `order`, 0, 1, ..., by falling strides, the last axis left where it is, and so those of one entry;
// all of them where the last is not dense or an axis is expanded. stride_order() in _problem.py is its twin.
void sort_as_strides(const TensorDesc& t, int* order) {
  const int last = t.rank - 1;
  if (last < 1 || t.stride[last] != 1) return;
  int wide[TensorDesc::kMaxRank];
  int count = 0;
  for (int axis = 0; axis < last; ++axis) {
    if (t.stride[axis] == 0) return;
    if (t.shape[axis] <= 1) continue;
    int at = count++;
    for (; at > 0 && t.stride[wide[at - 1]] < t.stride[axis]; --at) wide[at] = wide[at - 1];
    wide[at] = axis;
  }
  int next = 0;
  for (int axis = 0; axis < last; ++axis) {
    if (t.shape[axis] > 1) order[axis] = wide[next++];
  }
}

}  // namespace

Place place_of(const TensorRef& tensor) {
  Place place{kCodes.cpu, 0};
  check(aoti_torch_get_device_type(tensor.get(), &place.type));
  if (place.type != kCodes.cpu) check(aoti_torch_get_device_index(tensor.get(), &place.index));
  return place;
}

TensorDesc describe(const char* name, const TensorRef& tensor, Access access) {
  TensorDesc desc;
  if (!tensor) return desc;
  int64_t rank = 0;
  int64_t* shape = nullptr;
  int64_t* stride = nullptr;
  int32_t dtype = 0;
  check(aoti_torch_get_dim(tensor.get(), &rank));
  check(aoti_torch_get_sizes(tensor.get(), &shape));
  check(aoti_torch_get_strides(tensor.get(), &stride));
  check(aoti_torch_get_dtype(tensor.get(), &dtype));
  const Place place = place_of(tensor);
  desc.present = true;
  desc.dtype = dtype_of(dtype);
  if (desc.dtype == DType::kOther) desc.dtype_name = other_dtype_name(dtype);
  if (place.type != kCodes.cpu) desc.device = device_name(place);
  if (rank > TensorDesc::kMaxRank) raise(too_many_axes(name, shape, rank));
  desc.rank = int(rank);
  std::copy_n(shape, desc.rank, desc.shape);
  std::copy_n(stride, desc.rank, desc.stride);
  if (place.type != kCodes.cpu && place.type != kCodes.cuda) return desc;  // perhaps without memory
  if (access == Access::kWrite) {
    check(torch_get_mutable_data_ptr(tensor.get(), &desc.data));
  } else {
    // The const accessor: asking for a mutable one would copy a copy-on-write tensor.
    const void* data = nullptr;
    check(torch_get_const_data_ptr(tensor.get(), &data));
    desc.data = const_cast<void*>(data);
  }
  return desc;
}

NewTensor new_tensor(DType dtype, int rank, const int64_t* shape, Place place, const TensorDesc* like) {
  int order[TensorDesc::kMaxRank];
  std::iota(order, order + rank, 0);
  if (like) sort_as_strides(*like, order);
  NewTensor result;
  TensorDesc& desc = result.desc;
  desc.present = true;
  desc.dtype = dtype;
  desc.rank = rank;
  int64_t step = 1;
  int64_t bytes = size_of(dtype);
  for (int place_in_memory = rank - 1; place_in_memory >= 0; --place_in_memory) {
    const int axis = order[place_in_memory];
    desc.shape[axis] = shape[axis];
    desc.stride[axis] = step;
    const int64_t count = std::max<int64_t>(shape[axis], 1);
    if (__builtin_mul_overflow(bytes, count, &bytes)) {
      throw std::runtime_error("flash_attn_ext: out of memory: a result would have more than 2^63 bytes");
    }
    step *= count;
  }
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(rank, desc.shape, desc.stride, code_of(dtype), place.type, place.index,
                               &handle) != TORCH_SUCCESS) {
    throw std::runtime_error("flash_attn_ext: out of memory: a result of shape " + shape_text(desc) +
                             " needs " + std::to_string(bytes >> 20) + " MiB");
  }
  result.tensor = TensorRef(handle);
  check(torch_get_mutable_data_ptr(handle, &desc.data));
  return result;
}

void fill_with_zeros(const NewTensor& tensor) { check(aoti_torch_zero_(tensor.tensor.get())); }

NewTensor contiguous(TensorRef tensor, const TensorDesc& desc) {
  if (is_contiguous(desc)) return {std::move(tensor), desc};
  NewTensor copy = new_tensor(desc.dtype, desc.rank, desc.shape, place_of(tensor));
  check(aoti_torch_copy_(copy.tensor.get(), tensor.get(), 0));
  return copy;
}

int lse_shape(const TensorDesc& q, Layout layout, int64_t shape[3]) {
  int rank = 0;
  if (q.rank == 4) shape[rank++] = q.shape[0];
  if (q.rank == 2) {
    shape[rank++] = q.shape[0];
    return rank;
  }
  const int first = q.rank - 3;
  const bool heads_first = layout == Layout::kBhsd;
  shape[rank++] = q.shape[heads_first ? first : first + 1];
  shape[rank++] = q.shape[heads_first ? first + 1 : first];
  return rank;
}

}  // namespace fae::torch_ops
