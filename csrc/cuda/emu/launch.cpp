#include "cuda/emu/launch.h"

#include <numeric>
#include <utility>

#include "cuda/emu/block.h"
#include "cuda/emu/ranges.h"

namespace fae::cuda::emu {
namespace {

Block& block_of_this_os_thread() {
  thread_local Block block;
  return block;
}

}  // namespace

Options& options() {
  thread_local Options options;
  return options;
}

Instructions& instructions() {
  thread_local Instructions instructions;
  return instructions;
}

std::vector<AccessSite> access_sites() { return block_of_this_os_thread().recorder.report(); }

void reset_counters() {
  instructions() = {};
  block_of_this_os_thread().recorder.reset();
}

void launch(const LaunchConfig& config, void (*entry)(const void*), const void* params) {
  const auto refuse = [&](const std::string& why) {
    throw std::invalid_argument("emu::launch of '" + std::string(config.kernel) + "': " + why);
  };
  if (running) refuse("a kernel is running already");
  if (config.grid < 1 || config.grid > INT32_MAX)
    refuse("a grid of " + std::to_string(config.grid) + " blocks");
  if (config.threads < 1 || config.threads > 1024 || config.threads % int(kLanes) != 0) {
    refuse(std::to_string(config.threads) + " threads are no multiple of 32 up to 1024");
  }
  if (config.shared_bytes > kMaxSharedBytes) {
    refuse(std::to_string(config.shared_bytes) + " bytes of shared memory");
  }
  Block& block = block_of_this_os_thread();
  block.config = config;
  block.options = options();
  block.entry = entry;
  block.params = params;
  block.clock.tick();
  block.schedule.start_launch(block.options.seed);
  LaunchClock& launches = launch_clock();
  launches.start = block.clock.epoch_start;
  launches.blocks.clear();
  ++instructions().launches;

  // Blocks come in any order on a device.
  std::vector<int64_t> order(static_cast<size_t>(config.grid));
  std::iota(order.begin(), order.end(), int64_t(0));
  Random random;
  random.seed(block.options.seed, 0);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  for (int64_t index : order) {
    launches.blocks.push_back({block.clock.epoch + 1, index});
    block.run(index);
  }
}

std::string thread_text(int thread) {
  return "thread " + std::to_string(thread) + " (warp " + std::to_string(thread / int(kLanes)) + ", lane " +
         std::to_string(thread % int(kLanes)) + ")";
}

std::string text(const Where& where) {
  std::string file = where.file;
  for (const char* root : {"csrc/", "tests/"}) {
    const size_t at = file.rfind(root);
    if (at != std::string::npos) {
      file = file.substr(at);
      break;
    }
  }
  return file + ":" + std::to_string(where.line);
}

void fault(int thread, const Where& where, const std::string& what) {
  const Block& block = this_block();
  throw Fault("kernel '" + std::string(block.config.kernel) + "', block " + std::to_string(block.index) +
              " of " + std::to_string(block.config.grid) + ", " + thread_text(thread) + ", " + text(where) +
              ": " + what);
}

void fault(const Where& where, const std::string& what) { fault(running_thread().index, where, what); }

}  // namespace fae::cuda::emu
