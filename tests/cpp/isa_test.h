// Tests that run once per ISA of this machine.
#pragma once

#include <gtest/gtest.h>

#include "probe.h"

namespace fae::cpu {

class IsaTest : public ::testing::TestWithParam<Isa> {
 protected:
  const probe::IsaProbe& isa() const { return probe::probe_of(GetParam()); }
};

inline std::string isa_name(const ::testing::TestParamInfo<Isa>& info) { return name_of(info.param); }

// A suite of tests over every ISA that this machine runs.
#define FAE_ISA_SUITE(Suite)                                                              \
  class Suite : public ::fae::cpu::IsaTest {};                                            \
  INSTANTIATE_TEST_SUITE_P(Isa, Suite, ::testing::ValuesIn(::fae::cpu::available_isas()), \
                           ::fae::cpu::isa_name)

}  // namespace fae::cpu
