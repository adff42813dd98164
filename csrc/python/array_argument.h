// Arrays of any library as the core sees them: buffer protocol or DLPack.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "core/describe.h"
#include "python/dlpack.h"

namespace fae::python {

enum class Access : uint8_t { kRead, kWrite };

// Whatever has to be given back, also when the description of it fails half-way.
struct BorrowedMemory {
  Py_buffer buffer{};
  dlpack::Managed* managed = nullptr;
  dlpack::ManagedVersioned* versioned = nullptr;

  BorrowedMemory() = default;
  BorrowedMemory(const BorrowedMemory&) = delete;
  BorrowedMemory& operator=(const BorrowedMemory&) = delete;
  ~BorrowedMemory() {
    if (buffer.obj) PyBuffer_Release(&buffer);
    if (managed && managed->deleter) managed->deleter(managed);
    if (versioned && versioned->deleter) versioned->deleter(versioned);
  }
};

// Borrows the memory of a Python object for as long as this lives. Throws
// pybind11::type_error or value_error that name the argument.
class ArrayArgument {
 public:
  ArrayArgument(const char* name, const pybind11::object& object, Access access);
  const TensorDesc& desc() const { return desc_; }

 private:
  bool take_buffer(const pybind11::object& object);
  void take_dlpack(const pybind11::object& object);
  void describe(const dlpack::Tensor& tensor, bool read_only);
  void set_type(std::string name);
  // stride_bytes may be null (contiguous). Refuses strides that the core cannot hold.
  void set_axes(int64_t rank, const int64_t* shape, const int64_t* stride_bytes, int64_t item);
  void set_data(void* data, bool read_only, int64_t item);

  const char* name_;
  Access access_;
  TensorDesc desc_;
  std::string dtype_name_;
  BorrowedMemory memory_;
};

}  // namespace fae::python
