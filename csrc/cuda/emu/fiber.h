// Stackful coroutines: one per CUDA thread, and the switch between two of them.
#pragma once

#include <cstddef>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#define FAE_EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FAE_EMU_ASAN 1
#endif
#endif
#ifndef FAE_EMU_ASAN
#define FAE_EMU_ASAN 0
#endif

// x86-64 has a switch of its own, of a few instructions. ucontext does the same anywhere
// else, with two system calls each time (FAE_EMU_UCONTEXT asks for it on x86-64, too).
#if !defined(__x86_64__) || defined(FAE_EMU_UCONTEXT)
#define FAE_EMU_SWITCH_UCONTEXT 1
#include <ucontext.h>
#else
#define FAE_EMU_SWITCH_UCONTEXT 0
#endif

#if !FAE_EMU_SWITCH_UCONTEXT
// Leaves the running stack in *save and resumes the one at `load`.
extern "C" __attribute__((visibility("hidden"))) void fae_emu_switch_stack(void** save, void* load);
#endif

namespace fae::cuda::emu {

// A point of execution that was left and can be resumed.
class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Resuming it will call `entry`, which never returns, on the stack that ends at `top`.
  // `dirty`: the stack was left in the middle of something.
  void prepare(std::byte* bottom, std::byte* top, void (*entry)(), bool dirty);

  // Leaves the running point in *this and resumes `to`.
  void switch_to(Fiber& to) {
    if constexpr (FAE_EMU_ASAN) leave_for(to);
#if FAE_EMU_SWITCH_UCONTEXT
    swapcontext(&context_, &to.context_);
#else
    fae_emu_switch_stack(&stack_pointer_, to.stack_pointer_);
#endif
    if constexpr (FAE_EMU_ASAN) arrived(fake_stack_);
  }

  // The first statement of an entry function.
  static void entered() {
    if constexpr (FAE_EMU_ASAN) arrived(nullptr);
  }

 private:
  // The address sanitizer wants to know which stack is in use.
  void leave_for(Fiber& to);
  static void arrived(void* fake_stack);

#if FAE_EMU_SWITCH_UCONTEXT
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  void* fake_stack_ = nullptr;
};

// Memory for stacks, each above a page that nobody may touch. Kept until the pool goes.
class StackPool {
 public:
  static constexpr size_t kBytes = 256 * 1024;

  StackPool() = default;
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;
  ~StackPool();

  std::byte* bottom(int i);
  // Stacks that all ended at the same offset in a page would compete for the same few cache
  // lines of a set-associative cache.
  std::byte* top(int i) { return bottom(i) + kBytes - size_t(i % 32) * 128; }

 private:
  std::vector<std::byte*> mappings_;
};

}  // namespace fae::cuda::emu
