// Aligned allocations of the test program, which are the kernels' workspaces, are full of
// NaN and end at a page that nobody may touch. See also failing_new.h.
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

#include "failing_new.h"
#include "guarded.h"

namespace {

using Block = fae::testing::Guarded<std::byte>;

std::mutex mutex;
std::map<void*, Block>& blocks() {
  static auto* live = new std::map<void*, Block>;
  return *live;
}

thread_local bool no_memory = false;

}  // namespace

fae::testing::FailingNew::FailingNew() { no_memory = true; }
fae::testing::FailingNew::~FailingNew() { no_memory = false; }

void* operator new(std::size_t bytes) {
  void* const data = no_memory ? nullptr : std::malloc(bytes ? bytes : 1);
  if (!data) throw std::bad_alloc();
  return data;
}
// Inlined, this would look like a free() of what new has made.
[[gnu::noinline]] void operator delete(void* data) noexcept { std::free(data); }
[[gnu::noinline]] void operator delete(void* data, std::size_t) noexcept { std::free(data); }

void* operator new(std::size_t bytes, std::align_val_t alignment) {
  if (no_memory || bytes >= fae::testing::kTooManyBytes) throw std::bad_alloc();
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
