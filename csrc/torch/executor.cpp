#include "torch/executor.h"

#include <pthread.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <stdexcept>

#include "cpu/std_executor.h"

namespace fae::torch_ops {
namespace {

// The threads of an OpenMP pool do not survive fork(), yet the child's copy of the
// pool waits for them. A forked child therefore brings its own threads.
bool is_forked_child = false;
const int kForkHook = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });

void run_on_torch_pool(void* context, int workers, void (*body)(void* arg, int worker), void* arg) {
  if (is_forked_child) return cpu::run_on_std_threads(context, workers, body, arg);
  cpu::GuardedBody guarded(body, arg);
  const auto range = [](int64_t begin, int64_t end, void* region) {
    for (int64_t worker = begin; worker < end; ++worker) {
      (*static_cast<cpu::GuardedBody*>(region))(int(worker));
    }
  };
  if (torch_parallel_for(0, workers, 1, range, &guarded) != TORCH_SUCCESS) {
    throw std::runtime_error("flash_attn_ext: torch's thread pool failed");
  }
  guarded.rethrow_if_failed();
}

}  // namespace

cpu::Executor torch_executor() {
  uint32_t threads = 1;
  if (torch_get_num_threads(&threads) != TORCH_SUCCESS || threads == 0) threads = 1;
  return {int(threads), nullptr, run_on_torch_pool};
}

}  // namespace fae::torch_ops
