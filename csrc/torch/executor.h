#pragma once

#include "cpu/parallel.h"

namespace fae::torch_ops {

// Runs on torch's own thread pool with as many workers as torch.get_num_threads().
cpu::Executor torch_executor();

}  // namespace fae::torch_ops
