#include "python/array_argument.h"

#include <cstring>
#include <string>

namespace py = pybind11;

namespace fae::python {
namespace {

// The struct-module code of a buffer's elements, native byte order only.
DType dtype_of_format(const char* format) {
  if (!format) return DType::kOther;
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  if (std::strcmp(format, "f") == 0) return DType::kFloat32;
  if (std::strcmp(format, "d") == 0) return DType::kFloat64;
  if (std::strcmp(format, "e") == 0) return DType::kFloat16;
  return DType::kOther;
}

DType dtype_of(dlpack::DataType type) {
  if (type.lanes != 1) return DType::kOther;
  if (type.code == dlpack::kBfloat && type.bits == 16) return DType::kBFloat16;
  if (type.code != dlpack::kFloat) return DType::kOther;
  return type.bits == 16   ? DType::kFloat16
         : type.bits == 32 ? DType::kFloat32
         : type.bits == 64 ? DType::kFloat64
                           : DType::kOther;
}

std::string type_name(const py::object& object) { return Py_TYPE(object.ptr())->tp_name; }

py::object export_capsule(const char* name, const py::object& object) {
  try {
    const auto device = object.attr("__dlpack_device__")().cast<py::tuple>();
    const int type = int(py::int_(device[0]));
    if (type != dlpack::kCpu && type != dlpack::kCudaHost) {
      throw py::value_error(std::string(name) + " is on DLPack device type " + std::to_string(type) +
                            ", expected the CPU");
    }
    try {
      return object.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0));
    } catch (const py::error_already_set& error) {
      if (!error.matches(PyExc_TypeError)) throw;
      return object.attr("__dlpack__")();  // a producer from before DLPack 1.0
    }
  } catch (const py::error_already_set& error) {
    throw py::value_error(std::string(name) +
                          " cannot be exported through DLPack: " + std::string(py::str(error.value())));
  }
}

}  // namespace

ArrayArgument::ArrayArgument(const char* name, const py::object& object, Access access)
    : name_(name), access_(access) {
  desc_.present = true;
  if (!take_buffer(object)) take_dlpack(object);
}

void ArrayArgument::check_rank(int64_t rank) const {
  if (rank >= 2 && rank <= 4) return;
  throw py::value_error(
      std::string(name_) + " has " + std::to_string(rank) +
      " dimensions, expected 2 (seq, dim), 3 (seq, heads, dim) or 4 (batch, seq, heads, dim)");
}

void ArrayArgument::set_axis(int axis, int64_t size, int64_t stride_bytes) {
  const int64_t item = size_of(desc_.dtype);
  if (size > 1 && stride_bytes < 0) {
    throw py::value_error(std::string(name_) + " has a negative stride in dimension " + std::to_string(axis) +
                          ", expected strides >= 0: pass a copy");
  }
  if (size > 1 && stride_bytes % item != 0) {
    throw py::value_error(std::string(name_) + " has a stride of " + std::to_string(stride_bytes) +
                          " bytes in dimension " + std::to_string(axis) + ", expected a multiple of " +
                          std::to_string(item));
  }
  desc_.shape[axis] = size;
  desc_.stride[axis] = size > 1 ? stride_bytes / item : 0;
}

bool ArrayArgument::take_buffer(const py::object& object) {
  if (!PyObject_CheckBuffer(object.ptr())) return false;
  if (PyObject_GetBuffer(object.ptr(), &memory_.buffer, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
    PyErr_Clear();  // NumPy refuses dtypes that struct cannot spell; DLPack may know them
    memory_.buffer.obj = nullptr;
    if (py::hasattr(object, "__dlpack__")) return false;
    throw py::type_error(std::string(name_) + " is a " + type_name(object) +
                         " whose elements cannot be exported");
  }
  desc_.dtype = dtype_of_format(memory_.buffer.format);
  if (desc_.dtype == DType::kOther) {
    throw py::type_error(std::string(name_) + " has elements of format '" +
                         (memory_.buffer.format ? memory_.buffer.format : "B") +
                         "', expected float16, bfloat16, float32 or float64 in native byte order");
  }
  check_rank(memory_.buffer.ndim);
  if (access_ == Access::kWrite && memory_.buffer.readonly) {
    throw py::value_error(std::string(name_) + " is read-only, expected a writable array");
  }
  desc_.rank = memory_.buffer.ndim;
  for (int axis = 0; axis < desc_.rank; ++axis)
    set_axis(axis, memory_.buffer.shape[axis], memory_.buffer.strides[axis]);
  desc_.data = memory_.buffer.buf;
  if (reinterpret_cast<uintptr_t>(desc_.data) % uintptr_t(size_of(desc_.dtype)) != 0) {
    throw py::value_error(std::string(name_) + " is not aligned to its element size: pass a copy");
  }
  return true;
}

void ArrayArgument::take_dlpack(const py::object& object) {
  if (!py::hasattr(object, "__dlpack__")) {
    throw py::type_error(std::string(name_) + " is a " + type_name(object) +
                         ", expected an array (a NumPy array, a torch tensor, a buffer or a DLPack object)");
  }
  const py::object capsule = export_capsule(name_, object);
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    memory_.versioned =
        static_cast<dlpack::ManagedVersioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
    if (access_ == Access::kWrite && (memory_.versioned->flags & dlpack::kReadOnly)) {
      throw py::value_error(std::string(name_) + " is read-only, expected a writable array");
    }
    describe(memory_.versioned->tensor);
  } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    memory_.managed = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    describe(memory_.managed->tensor);
  } else {
    throw py::type_error(std::string(name_) + ".__dlpack__() did not return a DLPack capsule");
  }
}

void ArrayArgument::describe(const dlpack::Tensor& tensor) {
  desc_.dtype = dtype_of(tensor.dtype);
  if (desc_.dtype == DType::kOther) {
    throw py::type_error(std::string(name_) + " has DLPack type code " + std::to_string(tensor.dtype.code) +
                         " with " + std::to_string(tensor.dtype.bits) +
                         " bits, expected float16, bfloat16, float32 or float64");
  }
  check_rank(tensor.ndim);
  desc_.rank = tensor.ndim;
  const int64_t item = size_of(desc_.dtype);
  int64_t contiguous = item;
  for (int axis = desc_.rank - 1; axis >= 0; --axis) {
    set_axis(axis, tensor.shape[axis], tensor.strides ? tensor.strides[axis] * item : contiguous);
    contiguous *= tensor.shape[axis];
  }
  desc_.data = tensor.data ? static_cast<char*>(tensor.data) + tensor.byte_offset : nullptr;
}

}  // namespace fae::python
