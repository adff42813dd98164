// Aligned allocations of the test program, which are the kernels' workspaces, are full of
// NaN and end at a page that nobody may touch.
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

#include "guarded.h"

namespace {

using Block = fae::testing::Guarded<std::byte>;

std::mutex mutex;
std::map<void*, Block>& blocks() {
  static auto* live = new std::map<void*, Block>;
  return *live;
}

}  // namespace

void* operator new(std::size_t bytes, std::align_val_t alignment) {
  if (bytes > std::size_t(1) << 40) throw std::bad_alloc();
  const std::size_t unit = std::size_t(alignment);
  Block block((bytes + unit - 1) / unit * unit);
  void* const data = block.data();
  const std::lock_guard<std::mutex> lock(mutex);
  blocks().emplace(data, std::move(block));
  return data;
}

void operator delete(void* data, std::align_val_t) noexcept {
  const std::lock_guard<std::mutex> lock(mutex);
  blocks().erase(data);
}
void operator delete(void* data, std::size_t, std::align_val_t alignment) noexcept {
  operator delete(data, alignment);
}
