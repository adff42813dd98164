// The choice of instruction set.
#include "cpu/dispatch.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fae::cpu {
namespace {

class Dispatch : public testing::Test {
 protected:
  void TearDown() override { unsetenv("FLASH_ATTN_EXT_CPU_ISA"); }
};

TEST_F(Dispatch, ScalarIsAlwaysThereAndLast) {
  const auto isas = available_isas();
  ASSERT_FALSE(isas.empty());
  EXPECT_EQ(isas.back(), Isa::kScalar);
  unsetenv("FLASH_ATTN_EXT_CPU_ISA");
  EXPECT_EQ(active_isa(), isas.front());
}

TEST_F(Dispatch, EnvironmentOverrides) {
  for (Isa isa : available_isas()) {
    setenv("FLASH_ATTN_EXT_CPU_ISA", name_of(isa), 1);
    EXPECT_EQ(active_isa(), isa);
  }
  setenv("FLASH_ATTN_EXT_CPU_ISA", "", 1);
  EXPECT_EQ(active_isa(), available_isas().front());
}

TEST_F(Dispatch, UnknownNameSaysWhatThereIs) {
  setenv("FLASH_ATTN_EXT_CPU_ISA", "sse9", 1);
  try {
    active_isa();
    FAIL() << "accepted";
  } catch (const std::invalid_argument& e) {
    EXPECT_NE(std::string(e.what()).find("sse9"), std::string::npos);
    EXPECT_NE(std::string(e.what()).find("scalar"), std::string::npos);
  }
}

TEST_F(Dispatch, EveryIsaHasEveryDtype) {
  for (Isa isa : available_isas()) {
    for (DType t : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
      const DTypeKernels& k = kernels_for(isa, t);
      EXPECT_NE(k.forward.run, nullptr);
      EXPECT_NE(k.forward.workspace, nullptr);
      EXPECT_GT(k.info.register_rows, 0);
      EXPECT_EQ(k.info.accumulator_bytes, t == DType::kFloat64 ? 8 : 4);
    }
  }
}

TEST_F(Dispatch, AnIsaOfAnotherArchitectureIsRefused) {
#if defined(__x86_64__)
  EXPECT_THROW(kernels_for(Isa::kNeon, DType::kFloat32), std::invalid_argument);
#else
  EXPECT_THROW(kernels_for(Isa::kAvx2, DType::kFloat32), std::invalid_argument);
#endif
}

}  // namespace
}  // namespace fae::cpu
