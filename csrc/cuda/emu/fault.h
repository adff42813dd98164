// What a kernel did wrong: thrown from the launch that found it.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/emu/where.h"

namespace fae::cuda::emu {

class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Throws a Fault that names the kernel, the block, a thread of it and the line.
[[noreturn]] void fault(int thread, const Where& where, const std::string& what);
// The same of the running thread.
[[noreturn]] void fault(const Where& where, const std::string& what);

// "thread 37 (warp 1, lane 5)"
std::string thread_text(int thread);

}  // namespace fae::cuda::emu
