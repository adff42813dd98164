#include "python/array_argument.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace fae::python {
namespace {

DType dtype_named(const std::string& name) {
  for (const DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
    if (name == name_of(dtype)) return dtype;
  }
  return DType::kOther;
}

// NumPy's name of a buffer's elements, from their struct-module code and their size.
std::string name_of_format(const char* format, int64_t bytes) {
  const std::string code = format ? format : "B";
  const bool has_order = code.find_first_of("@=<>!") == 0;
  const std::string order = code.find_first_of(">!") == 0 ? "big-endian " : "";
  const std::string letter = code.substr(has_order ? 1 : 0);
  const std::string bits = std::to_string(8 * bytes);
  if (letter == "?") return "bool";
  if (letter.size() == 2 && letter[0] == 'Z') return order + "complex" + bits;
  if (letter.size() != 1) return "'" + code + "'";
  if (letter.find_first_of("efdg") == 0) return order + "float" + bits;
  if (letter.find_first_of("bhilqn") == 0) return order + "int" + bits;
  if (letter.find_first_of("BHILQN") == 0) return order + "uint" + bits;
  return "'" + code + "'";
}

std::string name_of_type(dlpack::DataType type) {
  const char* kind = type.code == dlpack::kFloat     ? "float"
                     : type.code == dlpack::kBfloat  ? "bfloat"
                     : type.code == dlpack::kInt     ? "int"
                     : type.code == dlpack::kUInt    ? "uint"
                     : type.code == dlpack::kComplex ? "complex"
                     : type.code == dlpack::kBool    ? "bool"
                                                     : "DLPack type ";
  const std::string name = kind + (type.code == dlpack::kBool ? "" : std::to_string(type.bits));
  return type.lanes == 1 ? name : name + "x" + std::to_string(type.lanes);
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

void ArrayArgument::set_type(std::string name) {
  dtype_name_ = std::move(name);
  desc_.dtype = dtype_named(dtype_name_);
  desc_.dtype_name = dtype_name_.c_str();
}

void ArrayArgument::set_axes(int64_t rank, const int64_t* shape, const int64_t* stride_bytes, int64_t item) {
  if (rank > TensorDesc::kMaxRank) {
    throw py::value_error(too_many_axes(name_, shape, rank).text);
  }
  desc_.rank = int(rank);
  int64_t contiguous = item;
  for (int axis = desc_.rank - 1; axis >= 0; --axis) {
    const int64_t step = stride_bytes ? stride_bytes[axis] : contiguous;
    contiguous *= shape[axis];
    desc_.shape[axis] = shape[axis];
    if (shape[axis] <= 1) continue;  // never stepped over
    if (step < 0) {
      throw py::value_error(std::string(name_) + " has a negative stride in dimension " +
                            std::to_string(axis) + ", expected strides >= 0: pass a copy");
    }
    if (step % item != 0) {
      throw py::value_error(std::string(name_) + " has a stride of " + std::to_string(step) +
                            " bytes in dimension " + std::to_string(axis) + ", expected a multiple of " +
                            std::to_string(item));
    }
    desc_.stride[axis] = step / item;
  }
}

void ArrayArgument::set_data(void* data, bool read_only, int64_t item) {
  if (access_ == Access::kWrite && read_only) {
    throw py::value_error(std::string(name_) + " is read-only, expected a writable array");
  }
  if (reinterpret_cast<uintptr_t>(data) % uintptr_t(item) != 0 && desc_.dtype != DType::kOther) {
    throw py::value_error(std::string(name_) + " is not aligned to its element size: pass a copy");
  }
  desc_.data = data;
}

bool ArrayArgument::take_buffer(const py::object& object) {
  if (!PyObject_CheckBuffer(object.ptr())) return false;
  Py_buffer& buffer = memory_.buffer;
  if (PyObject_GetBuffer(object.ptr(), &buffer, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
    PyErr_Clear();  // NumPy refuses dtypes that struct cannot spell; DLPack may know them
    buffer.obj = nullptr;
    if (py::hasattr(object, "__dlpack__")) return false;
    throw py::type_error(std::string(name_) + " is a " + type_name(object) +
                         " whose elements cannot be exported");
  }
  const int64_t item = std::max<int64_t>(buffer.itemsize, 1);
  set_type(name_of_format(buffer.format, item));
  set_axes(buffer.ndim, buffer.shape, buffer.strides, item);
  set_data(buffer.buf, buffer.readonly != 0, item);
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
    describe(memory_.versioned->tensor, (memory_.versioned->flags & dlpack::kReadOnly) != 0);
  } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    memory_.managed = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    describe(memory_.managed->tensor, false);
  } else {
    throw py::type_error(std::string(name_) + ".__dlpack__() did not return a DLPack capsule");
  }
}

void ArrayArgument::describe(const dlpack::Tensor& tensor, bool read_only) {
  const int64_t item = std::max<int64_t>(int64_t(tensor.dtype.bits) * tensor.dtype.lanes / 8, 1);
  set_type(name_of_type(tensor.dtype));
  std::vector<int64_t> stride_bytes;
  for (int axis = 0; tensor.strides && axis < tensor.ndim; ++axis) {
    stride_bytes.push_back(tensor.strides[axis] * item);
  }
  set_axes(tensor.ndim, tensor.shape, tensor.strides ? stride_bytes.data() : nullptr, item);
  set_data(tensor.data ? static_cast<char*>(tensor.data) + tensor.byte_offset : nullptr, read_only, item);
}

}  // namespace fae::python
