// What forward_test.cpp and backward_test.cpp share: every ISA x dtype x case.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "extended_cases.h"

namespace fae::testing {

constexpr DType kDTypes[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};

// Rounding of the result, of 16-bit probabilities, and of fp32 sums; relative to the
// largest element.
inline double forward_tolerance(DType t) {
  switch (t) {
    case DType::kFloat64: return 1e-13;
    case DType::kFloat32: return 4e-6;
    case DType::kFloat16: return 1e-3;
    default: return 8e-3;
  }
}
inline double backward_tolerance(DType t) {
  switch (t) {
    case DType::kFloat64: return 1e-12;
    case DType::kFloat32: return 2e-5;
    case DType::kFloat16: return 4e-3;
    default: return 3e-2;
  }
}

class KernelTest : public ::testing::TestWithParam<cpu::Isa> {};

#define FAE_KERNEL_SUITE(Suite)                                                           \
  class Suite : public ::fae::testing::KernelTest {};                                     \
  INSTANTIATE_TEST_SUITE_P(Isa, Suite, ::testing::ValuesIn(::fae::cpu::available_isas()), \
                           [](const auto& info) { return std::string(::fae::cpu::name_of(info.param)); })

inline std::vector<CaseSpec> all_cases() {
  std::vector<CaseSpec> all = kernel_cases();
  all.insert(all.end(), extended_cases().begin(), extended_cases().end());
  return all;
}

// fn(spec) for each case in each dtype, traced by name.
template <class Fn>
void for_each_case(Fn&& fn) {
  for (CaseSpec spec : all_cases()) {
    for (DType t : kDTypes) {
      spec.dtype = t;
      SCOPED_TRACE(spec.name + " " + fae::name_of(t));
      fn(spec);
    }
  }
}

inline CaseSpec case_named(const std::string& name, DType t = DType::kFloat32) {
  for (CaseSpec spec : all_cases()) {
    if (spec.name != name) continue;
    spec.dtype = t;
    return spec;
  }
  ADD_FAILURE() << "no case " << name;
  return {};
}

}  // namespace fae::testing
