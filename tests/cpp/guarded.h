// Arrays that end, or begin, at a page nobody may touch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace fae::testing {

// `count` elements between two inaccessible pages: reading or writing one byte past the
// end (kEnd) or before the beginning (kBegin) stops the process. Filled with 0xff bytes,
// a NaN in every floating type, so that what is read unset shows.
template <class T>
class Guarded {
 public:
  enum class Side { kBegin, kEnd };
  explicit Guarded(size_t count, Side side = Side::kEnd) : count_(count) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const size_t bytes = (count * sizeof(T) + page - 1) / page * page;
    mapped_ = bytes + 2 * page;
    base_ = static_cast<std::byte*>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
#ifdef __SANITIZE_ADDRESS__
    // A thread's stack may have been here, whose marks outlive its unmapping.
    __asan_unpoison_memory_region(base_, mapped_);
#endif
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + page + bytes, page, PROT_NONE);
    memset(base_ + page, 0xff, bytes);
    std::byte* const first = side == Side::kBegin ? base_ + page : base_ + page + bytes - count * sizeof(T);
    data_ = reinterpret_cast<T*>(first);
  }
  Guarded(Guarded&& other) noexcept { *this = std::move(other); }
  Guarded& operator=(Guarded&& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(mapped_, other.mapped_);
    std::swap(data_, other.data_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~Guarded() {
    if (base_) munmap(base_, mapped_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }
  T* begin() { return data_; }
  T* end() { return data_ + count_; }

 private:
  std::byte* base_ = nullptr;
  size_t mapped_ = 0;
  T* data_ = nullptr;
  size_t count_ = 0;
};

}  // namespace fae::testing
