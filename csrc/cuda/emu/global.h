// Global memory: what a kernel may touch, and its accesses, each checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cuda/emu/where.h"

namespace fae::cuda::emu {

void load_global(void* value, const void* address, size_t bytes, Where where);
void store_global(void* address, const void* value, size_t bytes, Where where);
void add_global(float* address, float value, Where where);

enum class Access : uint8_t { kRead, kReadWrite };
// Whether the memory has values before the first launch.
enum class Contents : uint8_t { kSet, kUnset };

// A tensor: elements of `element_bytes` at strides counted in elements.
struct Extent {
  static constexpr int kMaxRank = 5;
  size_t element_bytes = 1;
  int rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};

  static Extent of_bytes(size_t bytes) { return {1, 1, {int64_t(bytes)}, {1}}; }
};

struct Range;

// The ranges of the calling OS thread: launches of one thread see what that thread has
// registered, and nothing needs a lock. Ranges may overlap: an access has to be allowed by
// one of them, as a whole.
class GlobalMemory {
 public:
  GlobalMemory();
  ~GlobalMemory();
  GlobalMemory(const GlobalMemory&) = delete;
  GlobalMemory& operator=(const GlobalMemory&) = delete;

  // Returns a number for remove() and first_unset(). What lies between the elements of a
  // strided tensor is not part of it.
  int add(const void* data, const Extent& extent, const std::string& name, Access access,
          Contents contents = Contents::kSet);
  int add(const void* data, size_t bytes, const std::string& name, Access access,
          Contents contents = Contents::kSet) {
    return add(data, Extent::of_bytes(bytes), name, access, contents);
  }
  void remove(int id);
  void clear();

  // Offset in bytes of an element that no launch has written, or -1.
  int64_t first_unset(int id) const;

  // For the accesses above.
  const std::vector<std::unique_ptr<Range>>& ranges() const { return ranges_; }
  Range* last_hit = nullptr;

 private:
  std::vector<std::unique_ptr<Range>> ranges_;
  int next_id_ = 0;
};

GlobalMemory& global_memory();

// Registers a range for as long as it lives.
class ScopedRange {
 public:
  template <class... Args>
  explicit ScopedRange(const Args&... args) : id_(global_memory().add(args...)) {}
  ~ScopedRange() {
    if (id_ >= 0) global_memory().remove(id_);
  }
  ScopedRange(ScopedRange&& other) noexcept : id_(other.id_) { other.id_ = -1; }
  ScopedRange(const ScopedRange&) = delete;
  ScopedRange& operator=(const ScopedRange&) = delete;
  int id() const { return id_; }

 private:
  int id_;
};

}  // namespace fae::cuda::emu
