// The DLPack exchange structures (dmlc/dlpack, ABI versions 0 and 1), as published.
#pragma once

#include <cstdint>

namespace fae::dlpack {

struct Device {
  int32_t type;
  int32_t id;
};
constexpr int32_t kCpu = 1;
constexpr int32_t kCudaHost = 3;  // pinned host memory

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
constexpr uint8_t kInt = 0;
constexpr uint8_t kUInt = 1;
constexpr uint8_t kFloat = 2;
constexpr uint8_t kBfloat = 4;
constexpr uint8_t kComplex = 5;
constexpr uint8_t kBool = 6;

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;    // (ndim)
  int64_t* strides;  // (ndim), in elements; null for contiguous
  uint64_t byte_offset;
};

// In a capsule named "dltensor".
struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed* self);
};

// In a capsule named "dltensor_versioned".
struct Version {
  uint32_t major;
  uint32_t minor;
};
struct ManagedVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedVersioned* self);
  uint64_t flags;
  Tensor tensor;
};
constexpr uint64_t kReadOnly = 1;

}  // namespace fae::dlpack
