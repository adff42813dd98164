// The CPU backend as its callers see it: plan, then run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "core/problem.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace fae::cpu {

enum class Isa : uint8_t { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx, kNeon };

const char* name_of(Isa isa);
// ISAs that this binary holds and this processor runs, best first.
std::vector<Isa> available_isas();
// The best available one, or the one that FLASH_ATTN_EXT_CPU_ISA names. Throws
// std::invalid_argument for a name that is unknown or that cannot run here.
Isa active_isa();

// Up to so many packed rows of a K/V head are few; see Plan::direct.
constexpr int kDirectRows = 12;

// What a call will do: chosen from the problem before anything runs.
struct Plan {
  Isa isa = Isa::kScalar;
  const char* kernel = "";  // "f32", "bf16_dot", "f64", ...
  int register_rows = 0;    // micro-kernel tile, rows x columns
  int register_cols = 0;
  int64_t block_q = 0;   // packed query rows per task
  int64_t block_kv = 0;  // keys packed at a time
  int64_t tasks = 0;     // per round
  int64_t chunks = 1;    // backward: row chunks per K/V head that work side by side
  bool direct = false;   // few rows: queries are multiplied with keys where they lie, not packed
  int64_t splits = 1;    // then: ranges of keys that work side by side, split_keys each
  int64_t split_keys = 0;
  int64_t heads_together = 1;  // K/V heads that a task takes through the keys side by side
  int threads = 1;
  size_t worker_bytes = 0;  // workspace of one worker
  size_t shared_bytes = 0;  // workspace shared by all workers
  double flops = 0;         // matrix-product FLOPs of visible tiles
  double bytes = 0;         // compulsory traffic: inputs read once, outputs written once
  size_t workspace_bytes() const { return worker_bytes * size_t(threads) + shared_bytes; }
};

// Tile sizes that a caller would like; 0 leaves them to the planner. They are rounded to whole
// register tiles, to what there is to do, and to a few megabytes of workspace.
struct Advice {
  int64_t block_q = 0;
  int64_t block_kv = 0;
  int64_t splits = 0;  // of few rows' keys
  // A row's result must not depend on how many rows come with it.
  bool batch_invariant = false;
};

Plan plan_forward(const Problem& problem, Isa isa, int threads, const Advice& advice = {});
Plan plan_backward(const Problem& problem, Isa isa, int threads, const Advice& advice = {});

// What a planned call works in.
struct PlanMemory {
  explicit PlanMemory(const Plan& plan)
      : workers(plan.worker_bytes * size_t(plan.threads)), shared(plan.shared_bytes) {}
  Workspace workers, shared;
};

// Throw std::bad_alloc when the workspace cannot be had; nothing is written then.
void forward(const ForwardCall& call, const Plan& plan, const Executor& executor);
void backward(const BackwardCall& call, const Plan& plan, const Executor& executor);

// For callers who write something before that, and must have all memory first. Allocates nothing.
void forward(const ForwardCall& call, const Plan& plan, const PlanMemory& memory, const Executor& executor);

}  // namespace fae::cpu
