#include "cuda/emu/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if FAE_EMU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !FAE_EMU_SWITCH_UCONTEXT
// Callee-saved registers go to the old stack and come from the new one. Not inside a
// function: the compiler must take it for a call that may change any memory. It ends in a
// return, not a jump: the lanes of a warp wait at the same line, so the processor's
// prediction of this return and of those after it is right.
asm(R"(
  .text
  .globl fae_emu_switch_stack
  .hidden fae_emu_switch_stack
  .type fae_emu_switch_stack, @function
fae_emu_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  retq
  .size fae_emu_switch_stack, . - fae_emu_switch_stack
)");
#endif

namespace fae::cuda::emu {

#if FAE_EMU_ASAN
// Whom the running fiber was resumed from; the sanitizer learns the first stack this way.
static thread_local Fiber* leaving = nullptr;
#endif

void Fiber::prepare(std::byte* bottom, std::byte* top, void (*entry)(), bool dirty) {
  bottom_ = bottom;
  size_ = size_t(top - bottom);
  fake_stack_ = nullptr;
#if FAE_EMU_ASAN
  if (dirty) __asan_unpoison_memory_region(bottom, size_);
#else
  (void)dirty;
#endif
#if FAE_EMU_SWITCH_UCONTEXT
  getcontext(&context_);
  context_.uc_stack.ss_sp = bottom;
  context_.uc_stack.ss_size = size_;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#else
  // Six registers, the entry, and a return address of zero; the entry finds its stack
  // pointer 8 past a multiple of 16, as after a call.
  auto** const words = reinterpret_cast<void**>((uintptr_t(top) & ~uintptr_t(15)) - 64);
  for (int i = 0; i < 8; ++i) words[i] = nullptr;
  words[6] = reinterpret_cast<void*>(entry);
  stack_pointer_ = words;
#endif
}

#if FAE_EMU_ASAN
void Fiber::leave_for(Fiber& to) {
  leaving = this;
  __sanitizer_start_switch_fiber(&fake_stack_, to.bottom_, to.size_);
}

void Fiber::arrived(void* fake_stack) {
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
  leaving->bottom_ = bottom;
  leaving->size_ = size;
}
#endif

StackPool::~StackPool() {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  for (std::byte* mapping : mappings_) munmap(mapping, kBytes + page);
}

std::byte* StackPool::bottom(int i) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  while (mappings_.size() <= size_t(i)) {
    void* const mapping = mmap(nullptr, kBytes + page, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    mprotect(mapping, page, PROT_NONE);
    mappings_.push_back(static_cast<std::byte*>(mapping));
  }
  return mappings_[size_t(i)] + page;
}

}  // namespace fae::cuda::emu
