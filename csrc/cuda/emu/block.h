// The state of a running block. Internal to the emulator.
#pragma once

#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "cuda/emu/fiber.h"
#include "cuda/emu/launch.h"
#include "cuda/emu/schedule.h"
#include "cuda/emu/shadow.h"
#include "cuda/emu/sites.h"

namespace fae::cuda::emu {

constexpr size_t kMaxSharedBytes = 227 * 1024;

enum class Op : uint8_t {
  kWarpBarrier,
  kShuffleXor,
  kShuffle,
  kBallot,
  kLdmatrix,
  kLdmatrixTransposed,
  kMmaF16,
  kMmaBf16,
  kMmaTf32,
  kBlockBarrier,
  kBlockAny,
  kExit,
};
const char* name_of(Op op);

struct AsyncCopy {
  uint32_t dst;
  bool valid;
  bool read;  // the source's bytes are in `data` already
  const std::byte* src;
  Where where;
  std::byte data[16];
};

struct Block;

// What a rendezvous touches comes first: it is one cache line.
struct alignas(64) Thread {
  Block* block = nullptr;
  uint32_t index = 0;
  Op op = Op::kExit;  // what it waits in, or has waited in last
  Where where;
  void* args = nullptr;  // of the warp operation it waits in
  Fiber fiber;
  std::vector<AsyncCopy> copies;  // neither waited for nor given up, oldest first
  std::vector<size_t> groups;     // number of copies up to the end of each committed group

  uint32_t lane() const { return index % kLanes; }
  uint32_t warp() const { return index / kLanes; }
};

struct Warp {
  uint32_t arrived = 0;           // lanes that wait in a warp operation
  const Thread* first = nullptr;  // of those
  bool mixed = false;             // not all of them in the same one
  uint32_t phase = 0;             // warp barriers since the last block barrier
};

// One per OS thread, reused by all its launches.
struct Block {
  LaunchConfig config{};
  Options options;
  int64_t index = 0;
  uint32_t warps = 0;
  Warp warp[kMaxWarps];
  std::unique_ptr<Thread[]> threads{new Thread[kMaxWarps * kLanes]};
  StackPool stacks;
  bool stacks_dirty = false;
  Schedule schedule;
  uint32_t in_barrier = 0;
  uint32_t exited = 0;
  bool barrier_mixed = false;
  const Thread* barrier_first = nullptr;
  bool any = false, any_result = false;
  Clock clock;
  SharedShadow shared;
  AccessRecorder recorder;
  const void* params = nullptr;
  void (*entry)(const void*) = nullptr;
  std::exception_ptr error;
  Fiber launcher;

  // Runs block `i` to its end; throws what one of its threads has thrown.
  void run(int64_t i);

  // The running thread waits until all lanes of its warp have come to the same operation at
  // the same line; the last to come performs it by complete(threads, *this), where
  // `threads` points to the warp's 32.
  using Complete = void (*)(Thread* lanes, Block& block);
  void wait_in_warp(Op op, const Where& where, void* args, Complete complete);
  // The same for the block; returns whether `value` was true for any.
  bool wait_in_block(Op op, const Where& where, bool value);

  // Stamp of an access by `thread` now.
  Stamp stamp(uint32_t thread) const { return clock.stamp(warp[thread / kLanes].phase, thread); }

 private:
  static void thread_main();
  void resume_next(Thread& from);
  void finish_interval(uint32_t warp_index);
  [[noreturn]] void stuck(const char* what);
};

// The running CUDA thread of this OS thread, or none.
extern constinit thread_local Thread* running;

[[noreturn]] void refuse_outside();
inline Thread& running_thread() {
  Thread* const thread = running;
  if (!thread) refuse_outside();
  return *thread;
}
inline Block& this_block() { return *running_thread().block; }

}  // namespace fae::cuda::emu
