// One aligned block of scratch memory, gone when the call is.
#pragma once

#include <cstddef>
#include <new>

namespace fae::cpu {

class Workspace {
 public:
  static constexpr std::align_val_t kAlignment{64};
  explicit Workspace(size_t bytes)
      : data_(bytes ? static_cast<std::byte*>(::operator new(bytes, kAlignment)) : nullptr) {}
  ~Workspace() {
    if (data_) ::operator delete(data_, kAlignment);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  std::byte* data() const { return data_; }

 private:
  std::byte* data_;
};

}  // namespace fae::cpu
