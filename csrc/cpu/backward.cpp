// Runs the backward pass.
#include <atomic>
#include <cstring>
#include <memory>
#include <thread>

#include "cpu/dispatch.h"

namespace fae::cpu {
namespace {

// Enough heads to keep every thread busy: a task is a whole head.
void run_heads(const BackwardCall& call, const Plan& plan, const BackwardKernel& kernel, std::byte* workspace,
               const Executor& executor) {
  for_each_task(
      executor, plan.tasks,
      [&](int worker, int64_t unit) {
        kernel.run_head(call, plan, unit, workspace + size_t(worker) * plan.worker_bytes);
      },
      Sharing::kNeighbours);
}

// Few heads: their query rows are cut into chunks, a number that depends on the problem
// alone. Tasks are drawn block of keys by block, last first (under a causal mask the first
// keys keep most chunks busy), chunk by chunk, head by head. A chunk adds
// to its dQ rows block after block, and a block's dK and dV are summed chunk after chunk;
// a task that comes too early for that waits for one that was drawn before it, so the
// order of every sum is fixed and nothing can wait for ever. finished: the blocks that each task's unit and
// chunk have behind them, 0 at first.
void run_chunks(const BackwardCall& call, const Plan& plan, const BackwardKernel& kernel,
                const PlanMemory& memory, std::atomic<int64_t>* finished, const Executor& executor) {
  const Problem& p = call.problem;
  const int64_t units = plan.tasks / plan.chunks, last = plan.chunks - 1;
  const int64_t blocks = (p.seq_kv + plan.block_kv - 1) / plan.block_kv;
  const size_t dq_bytes = kernel.dq_bytes(p), dkv_bytes = kernel.dkv_bytes(p, plan);
  // Two sets of sums, so that a block can begin while the one before waits for its last chunk.
  std::byte *const shared = memory.shared.data(), *const sums = shared + size_t(units) * dq_bytes;
  const auto wait = [&](int64_t unit, int64_t chunk, int64_t count) {
    while (finished[size_t(unit * plan.chunks + chunk)].load(std::memory_order_acquire) < count) {
      std::this_thread::yield();
    }
  };
  for_each_task(executor, plan.tasks * blocks, [&](int worker, int64_t task) {
    const int64_t unit = task % units, chunk = task / units % plan.chunks, step = task / plan.tasks;
    const int64_t k = (blocks - 1 - step) * plan.block_kv;
    std::byte* const own = memory.workers.data() + size_t(worker) * plan.worker_bytes;
    wait(unit, chunk, step);
    const bool any = kernel.run_chunk(call, plan, unit, chunk, k, shared + size_t(unit) * dq_bytes, own);
    if (chunk == 0) wait(unit, last, step - 1);
    else wait(unit, chunk - 1, step + 1);
    kernel.merge_keys(call, plan, unit, chunk, k, any, sums + size_t(2 * unit + step % 2) * dkv_bytes, own);
    finished[size_t(unit * plan.chunks + chunk)].store(step + 1, std::memory_order_release);
  });
}

// For run_chunks.
std::unique_ptr<std::atomic<int64_t>[]> finished_blocks(const Plan& plan) {
  if (plan.chunks == 1) return nullptr;
  std::unique_ptr<std::atomic<int64_t>[]> finished(new std::atomic<int64_t>[size_t(plan.tasks)]);
  for (int64_t i = 0; i < plan.tasks; ++i) finished[size_t(i)].store(0, std::memory_order_relaxed);
  return finished;
}

double row_term(const RowValues<void>& rows, DType dtype, int64_t index) {
  return dtype == DType::kFloat64 ? static_cast<const double*>(rows.data)[index]
                                  : double(static_cast<const float*>(rows.data)[index]);
}

// grad[b][h], or grad[h] where it has no batches, as the sum over rows, in their order.
void sum_rows(const Problem& p, const RowValues<void>& rows, const PerHead& grad) {
  if (!grad.present()) return;
  const bool batched = grad.stride[0] != 0;
  for (int64_t h = 0; h < p.heads_q; ++h) {
    double sum = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence sequence = p.sequence(b);
      if (batched) sum = 0;
      for (int64_t i = 0; i < sequence.seq_q; ++i)
        sum += row_term(rows, p.dtype, rows.index(b, h, sequence.first_query + i));
      if (batched || b + 1 == p.batch)
        store_from_double(grad.data, grad.dtype, b * grad.stride[0] + h * grad.stride[1], sum);
    }
  }
}

// Memory for one number per row, laid out like lse.
class RowMemory {
 public:
  RowMemory(bool wanted, const BackwardCall& call, DType dtype)
      : memory_(wanted ? size_t(call.lse_count) * size_of(dtype) : 0),
        values_{memory_.data(), call.lse.batch_stride, call.lse.head_stride} {}
  const RowValues<void>& values() const { return values_; }

 private:
  Workspace memory_;
  RowValues<void> values_;
};

void clear_rows(const View4& x, DType dtype, int64_t heads, int64_t begin, int64_t end, int64_t columns) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t c = 0; c < columns; ++c)
        store_from_double(x.data, dtype, x.offset(0, h, row) + c * x.stride[3], 0);
    }
  }
}

// Gradients of rows and keys that belong to no sequence.
void clear_gradients_behind(const BackwardCall& call) {
  const Problem& p = call.problem;
  const Packing& packing = p.packing;
  const int64_t queries = packing.starts_q.at(p.batch), keys = packing.starts_kv.at(p.batch);
  clear_rows(call.dq, p.dtype, p.heads_q, queries, packing.total_q, p.dim);
  clear_rows(call.dk, p.dtype, p.heads_kv, keys, packing.total_kv, p.dim);
  clear_rows(call.dv, p.dtype, p.heads_kv, keys, packing.total_kv, p.dim_v);
}

}  // namespace

void backward(const BackwardCall& given, const Plan& plan, const Executor& executor) {
  const DTypeKernels& kernels = kernels_for(plan.isa, given.problem.dtype);
  Executor limited = executor;
  limited.threads = plan.threads;
  BackwardCall call = given;
  const Problem& p = call.problem;
  // All memory before anything is written.
  const PlanMemory memory(plan);
  const auto own = [&](int worker) { return memory.workers.data() + size_t(worker) * plan.worker_bytes; };
  const auto finished = finished_blocks(plan);
  const DType arithmetic = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const RowMemory dalibi_rows(call.dalibi.present(), call, arithmetic);
  const RowMemory dsink_rows(call.dsinks.present(), call, arithmetic);
  call.dalibi_rows = dalibi_rows.values();
  call.dsink_rows = dsink_rows.values();
  const bool far_rows = plan.tasks > 0 && p.seq_kv > 0 && kernels.log_sum.needed(call);
  const RowMemory lse_low(far_rows, call, lse_dtype(p.dtype));
  if (p.packing.present()) clear_gradients_behind(call);
  if (far_rows) {
    BackwardCall before = call;
    before.lse_low = lse_low.values();
    // The pass reads what it is to find out; nothing is known yet.
    std::memset(before.lse_low.data, 0, size_t(call.lse_count) * size_of(lse_dtype(p.dtype)));
    for_each_task(limited, kernels.log_sum.tasks(call, plan),
                  [&](int worker, int64_t task) { kernels.log_sum.run(before, plan, task, own(worker)); });
    call.lse_low = before.lse_low;
  }
  if (plan.tasks > 0) {
    if (plan.chunks == 1) run_heads(call, plan, kernels.backward, memory.workers.data(), limited);
    else run_chunks(call, plan, kernels.backward, memory, finished.get(), limited);
  }
  if (call.dbias.present()) {
    for_each_task(limited, kernels.bias_grad.tasks(call, plan),
                  [&](int worker, int64_t task) { kernels.bias_grad.run(call, plan, task, own(worker)); });
  }
  sum_rows(p, call.dalibi_rows, call.dalibi);
  sum_rows(p, call.dsink_rows, call.dsinks);
}

}  // namespace fae::cpu
