// Small kernels on the emulator, and the faults that they are meant to make.
#pragma once

#include <gtest/gtest.h>

#include <initializer_list>
#include <string>

#include "cuda/emu/launch.h"
#include "cuda/prim/convert.h"
#include "cuda/prim/cp_async.h"
#include "cuda/prim/global.h"
#include "cuda/prim/ldmatrix.h"
#include "cuda/prim/mma_sm80.h"
#include "cuda/prim/warp.h"

namespace fae::cuda::testing {

// Every test begins with nothing registered and ordinary options.
class EmulatorTest : public ::testing::Test {
 protected:
  void SetUp() override {
    emu::options() = {};
    emu::reset_counters();
    emu::global_memory().clear();
  }
  void TearDown() override { SetUp(); }
};

struct Shape {
  int threads = 32;
  size_t shared_bytes = 1024;
  int64_t grid = 1;
};

template <class Kernel>
void launch(const Shape& shape, const Kernel& kernel) {
  emu::launch({"mini", shape.grid, shape.threads, shape.shared_bytes}, kernel);
}

template <class Kernel>
std::string fault_of(const Shape& shape, const Kernel& kernel) {
  try {
    launch(shape, kernel);
  } catch (const emu::Fault& fault) {
    return fault.what();
  }
  return "no fault";
}

// Under each of a few schedules the kernel is faulted with a text that has all `parts`.
template <class Kernel>
void expect_fault(const Shape& shape, const Kernel& kernel, std::initializer_list<const char*> parts) {
  for (uint64_t seed = 0; seed < 5; ++seed) {
    emu::options().seed = seed;
    const std::string text = fault_of(shape, kernel);
    for (const char* part : parts) {
      ASSERT_NE(text.find(part), std::string::npos) << "seed " << seed << ": no '" << part << "' in:\n"
                                                    << text;
    }
  }
}

// And of a kernel without fault, that it has none.
template <class Kernel>
void expect_no_fault(const Shape& shape, const Kernel& kernel) {
  for (uint64_t seed = 0; seed < 5; ++seed) {
    emu::options().seed = seed;
    ASSERT_EQ(fault_of(shape, kernel), "no fault") << "seed " << seed;
  }
}

}  // namespace fae::cuda::testing
