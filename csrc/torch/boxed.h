// The calling convention of boxed stable-ABI kernels, without per-call allocations.
//
// A kernel gets a stack of 64-bit values, owns the tensors in it, and leaves its
// results in their place. TORCH_BOX would wrap every tensor in a shared_ptr.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <cstdint>
#include <optional>
#include <utility>

namespace fae::torch_ops {

// Owns one reference to a tensor; may be empty.
class TensorRef {
 public:
  TensorRef() = default;
  explicit TensorRef(AtenTensorHandle handle) : handle_(handle) {}
  TensorRef(TensorRef&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  TensorRef& operator=(TensorRef&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  TensorRef(const TensorRef&) = delete;
  TensorRef& operator=(const TensorRef&) = delete;
  ~TensorRef() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }
  explicit operator bool() const { return handle_ != nullptr; }

 private:
  AtenTensorHandle handle_ = nullptr;
};

// Takes the arguments off the stack, in the order of the schema.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}

  TensorRef tensor() { return TensorRef(take<AtenTensorHandle>()); }
  TensorRef optional_tensor() { return TensorRef(take<std::optional<AtenTensorHandle>>().value_or(nullptr)); }
  int64_t integer() { return take<int64_t>(); }
  double real() { return take<double>(); }
  std::optional<double> optional_real() { return take<std::optional<double>>(); }
  bool boolean() { return take<bool>(); }

 private:
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }

  StableIValue* next_;
};

inline void give(StableIValue* slot, TensorRef&& tensor) {
  *slot = torch::stable::detail::from(tensor.release());
}

}  // namespace fae::torch_ops
