// What the tests of the CUDA kernels share.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "cuda_case.h"
#include "kernel_test.h"

namespace fae::testing {

constexpr DType kCudaDTypes[] = {DType::kFloat16, DType::kBFloat16, DType::kFloat32};

#define FAE_CUDA_SUITE(Suite)                                                             \
  class Suite : public ::testing::TestWithParam<::fae::DType> {};                         \
  INSTANTIATE_TEST_SUITE_P(Type, Suite, ::testing::ValuesIn(::fae::testing::kCudaDTypes), \
                           [](const auto& info) { return std::string(::fae::name_of(info.param)); })

// The bias gradient is rounded to the bias's own dtype.
inline void expect_close(const Case& c, const BackwardResult& got, const BackwardResult& wanted) {
  double tolerance = backward_tolerance(c.spec.dtype);
  // Where probabilities are nearly one-hot, rounding of 16-bit out shows in delta.
  if (c.spec.scale && *c.spec.scale > 1) tolerance *= 4;
  EXPECT_EQ(mismatch(got.dq, wanted.dq, tolerance), "") << "dq";
  EXPECT_EQ(mismatch(got.dk, wanted.dk, tolerance), "") << "dk";
  EXPECT_EQ(mismatch(got.dv, wanted.dv, tolerance), "") << "dv";
  const double bias_tolerance = std::max(tolerance, backward_tolerance(c.spec.bias_dtype) / 4);
  EXPECT_EQ(mismatch(got.dbias, wanted.dbias, bias_tolerance), "") << "dbias";
  // What rounding of 16-bit out takes from delta is multiplied by distances.
  const double slope_tolerance = c.spec.dtype == DType::kFloat32 ? tolerance : 6 * tolerance;
  EXPECT_EQ(mismatch(got.dalibi, wanted.dalibi, slope_tolerance), "") << "dalibi_slopes";
  EXPECT_EQ(mismatch(got.dsinks, wanted.dsinks, tolerance), "") << "dsinks";
}

inline bool identical_all(const BackwardResult& a, const BackwardResult& b) {
  return identical(a.dq, b.dq) && identical(a.dk, b.dk) && identical(a.dv, b.dv) &&
         identical(a.dbias, b.dbias) && identical(a.dalibi, b.dalibi) && identical(a.dsinks, b.dsinks);
}

}  // namespace fae::testing
