#include "cuda/emu/block.h"

#include <algorithm>
#include <cstdlib>

namespace fae::cuda::emu {

constinit thread_local Thread* running = nullptr;

const char* name_of(Op op) {
  switch (op) {
    case Op::kWarpBarrier: return "warp_barrier";
    case Op::kShuffleXor: return "shuffle_xor";
    case Op::kShuffle: return "shuffle";
    case Op::kBallot: return "warp_ballot";
    case Op::kLdmatrix: return "ldmatrix_x4";
    case Op::kLdmatrixTransposed: return "ldmatrix_x4_transposed";
    case Op::kMmaF16: return "mma_m16n8k16_f16";
    case Op::kMmaBf16: return "mma_m16n8k16_bf16";
    case Op::kMmaTf32: return "mma_m16n8k8_tf32";
    case Op::kBlockBarrier: return "block_barrier";
    case Op::kBlockAny: return "block_any";
    case Op::kExit: return "returned";
  }
  return "?";
}

void refuse_outside() { throw std::logic_error("a CUDA primitive was called outside of emu::launch"); }

int thread_index() { return int(running_thread().index); }
int64_t block_index() { return this_block().index; }

inline __attribute__((always_inline)) void Block::resume_next(Thread& from) {
  const int32_t next = schedule.next(from.warp());
  if (next < 0) stuck("deadlock: no thread can go on");
  Thread& to = threads[uint32_t(next)];
  if (&to == &from) return;
  running = &to;
  from.fiber.switch_to(to.fiber);
}

void Block::run(int64_t i) {
  index = i;
  clock.start_block();
  shared.start_block(uint32_t(1024 + 128 * (options.seed % 8)), config.shared_bytes, options.races, clock);
  warps = uint32_t(config.threads) / kLanes;
  schedule.start_block(uint64_t(i), warps);
  in_barrier = exited = 0;
  barrier_mixed = any = false;
  error = nullptr;
  for (uint32_t w = 0; w < warps; ++w) warp[w] = {};
  for (int t = 0; t < config.threads; ++t) {
    Thread& thread = threads[size_t(t)];
    thread.block = this;
    thread.index = uint32_t(t);
    thread.copies.clear();
    thread.groups.clear();
    thread.fiber.prepare(stacks.bottom(t), stacks.top(t), thread_main, stacks_dirty);
  }
  stacks_dirty = false;
  running = &threads[uint32_t(schedule.next(0))];
  launcher.switch_to(running->fiber);
  running = nullptr;
  for (int t = 0; t < config.threads; ++t) {
    for (const AsyncCopy& copy : threads[size_t(t)].copies) shared.drop(copy.dst);
  }
  if (error) {
    stacks_dirty = true;
    recorder.drop_intervals();
    std::rethrow_exception(error);
  }
  ++instructions().blocks;
}

void Block::thread_main() {
  Fiber::entered();
  Thread& me = *running;
  Block& block = *me.block;
  try {
    block.entry(block.params);
  } catch (...) {
    block.error = std::current_exception();
  }
  if (!block.error) {
    me.op = Op::kExit;
    ++block.exited;
    if (block.options.count && block.exited == uint32_t(block.config.threads)) {
      for (uint32_t i = 0; i < block.warps; ++i) block.recorder.finish_interval(i);
    }
    try {
      if (block.exited < uint32_t(block.config.threads)) block.resume_next(me);
    } catch (...) {
      block.error = std::current_exception();
    }
  }
  me.fiber.switch_to(block.launcher);
  std::abort();  // nobody resumes a thread that has ended
}

void Block::finish_interval(uint32_t warp_index) {
  if (options.count) recorder.finish_interval(warp_index);
}

void Block::wait_in_warp(Op op, const Where& where, void* args, Complete complete) {
  Thread& me = *running;
  Warp& w = warp[me.warp()];
  Thread* const lanes = &threads[me.warp() * kLanes];
  me.op = op;
  me.where = where;
  me.args = args;
  // Those that have come are as one while `mixed` is not set.
  if (w.arrived == 0) w.first = &me;
  else if (w.first->op != op || w.first->where != where) w.mixed = true;
  if (++w.arrived == kLanes) {
    if (w.mixed) stuck("divergence: the lanes of a warp wait in different operations");
    finish_interval(me.warp());
    complete(lanes, *this);
    w.arrived = 0;
    schedule.release(me.warp());
  }
  resume_next(me);
}

bool Block::wait_in_block(Op op, const Where& where, bool value) {
  Thread& me = *running;
  me.op = op;
  me.where = where;
  // Those that have come are as one while `barrier_mixed` is not set.
  if (in_barrier == 0) barrier_first = &me;
  else if (barrier_first->op != op || barrier_first->where != where) barrier_mixed = true;
  any = any || value;
  if (++in_barrier == uint32_t(config.threads)) {
    if (barrier_mixed) stuck("divergence: the threads of a block wait in different barriers");
    ++instructions().block_barrier;
    clock.tick();
    for (uint32_t i = 0; i < warps; ++i) {
      finish_interval(i);
      warp[i].phase = 0;
      schedule.release(i);
    }
    in_barrier = 0;
    any_result = any;
    any = false;
  }
  resume_next(me);
  return any_result;
}

void Block::stuck(const char* what) {
  // Threads that wait at the same place are listed together, as ranges.
  struct Group {
    bool waits;
    Op op;
    Where where;
    std::vector<int> threads;
  };
  std::vector<Group> groups;
  for (int t = 0; t < config.threads; ++t) {
    const Thread& thread = threads[size_t(t)];
    const bool waits = schedule.waits(thread.index);
    const Op op = waits ? thread.op : Op::kExit;
    const Where where = op == Op::kExit ? Where{} : thread.where;
    auto group = std::find_if(groups.begin(), groups.end(), [&](const Group& g) {
      return g.waits == waits && g.op == op && g.where == where;
    });
    if (group == groups.end()) {
      groups.push_back({waits, op, where, {}});
      group = groups.end() - 1;
    }
    group->threads.push_back(t);
  }
  std::string message = "kernel '" + std::string(config.kernel) + "', block " + std::to_string(index) +
                        " of " + std::to_string(config.grid) + ": " + what;
  for (const Group& group : groups) {
    message += group.threads.size() > 1 ? "\n  threads " : "\n  thread ";
    for (size_t i = 0; i < group.threads.size();) {
      size_t end = i + 1;
      while (end < group.threads.size() && group.threads[end] == group.threads[end - 1] + 1) ++end;
      if (i > 0) message += ", ";
      message += std::to_string(group.threads[i]);
      if (end - i > 1) message.append("-").append(std::to_string(group.threads[end - 1]));
      i = end;
    }
    if (!group.waits) message += ": running";
    else if (group.op == Op::kExit) message += ": returned";
    else message.append(": ").append(name_of(group.op)).append(" at ").append(text(group.where));
  }
  throw Fault(message);
}

}  // namespace fae::cuda::emu
