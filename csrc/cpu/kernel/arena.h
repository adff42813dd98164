// A worker's memory: one block, handed out in cache-line aligned pieces.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/simd/vec.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

// With a null base nothing is handed out; used() then tells what is needed.
class Arena {
 public:
  explicit Arena(std::byte* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* at = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return at;
  }
  size_t used() const { return used_; }

 private:
  std::byte* base_;
  size_t used_ = 0;
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
