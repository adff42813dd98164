// exp2 and tanh of every ISA: accuracy in ulp, and special values.
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "isa_test.h"

namespace fae::cpu {
namespace {

using probe::VecProbe;

template <class Real>
constexpr Real kInf = std::numeric_limits<Real>::infinity();

template <class Real>
double ulp_of(long double x) {
  int exponent;
  std::frexp(std::fabs(double(x)), &exponent);
  return std::ldexp(1.0, exponent - std::numeric_limits<Real>::digits);
}

template <class Real>
Real apply(typename VecProbe<Real>::Unary fn, int width, Real x) {
  std::vector<Real> lanes(size_t(width), x), result(static_cast<size_t>(width));
  fn(lanes.data(), result.data());
  for (int i = 1; i < width; ++i) {
    EXPECT_TRUE(result[size_t(i)] == result[0] || std::isnan(result[0])) << "lanes differ at " << x;
  }
  return result[0];
}

// Largest error in ulp over `values`.
template <class Real, class Exact>
double worst_ulp(typename VecProbe<Real>::Unary fn, int width, const std::vector<Real>& values,
                 Exact&& exact) {
  double worst = 0;
  std::vector<Real> x(static_cast<size_t>(width)), r = x;
  for (size_t i = 0; i + size_t(width) <= values.size(); i += size_t(width)) {
    std::copy(values.begin() + long(i), values.begin() + long(i) + width, x.begin());
    fn(x.data(), r.data());
    for (size_t j = 0; j < size_t(width); ++j) {
      const long double wanted = exact(static_cast<long double>(x[j]));
      const double error = double(std::fabs(static_cast<long double>(r[j]) - wanted)) / ulp_of<Real>(wanted);
      if (!(error <= worst)) worst = error;
    }
  }
  return worst;
}

template <class Real>
std::vector<Real> uniform(double low, double high, int count) {
  std::mt19937_64 random(7);
  std::uniform_real_distribution<double> pick(low, high);
  std::vector<Real> values(static_cast<size_t>(count));
  for (Real& x : values) x = Real(pick(random));
  return values;
}

FAE_ISA_SUITE(Math);

template <class Real>
void check_exp2(const VecProbe<Real>& v) {
  const double lowest = sizeof(Real) == 4 ? -125.9 : -1021.9;
  const auto exact = [](long double x) { return std::exp2(x); };
  // The polynomial is below a quarter ulp; its evaluation and the final product round.
  EXPECT_LE((worst_ulp<Real>(v.exp2, v.width, uniform<Real>(-1, 1, 80000), exact)), 1.5);
  EXPECT_LE((worst_ulp<Real>(v.exp2, v.width, uniform<Real>(lowest, 0, 80000), exact)), 1.5);
  EXPECT_LE((worst_ulp<Real>(v.exp2, v.width, uniform<Real>(0, 100, 20000), exact)), 1.5);
  EXPECT_LE((worst_ulp<Real>(v.exp2, v.width, uniform<Real>(-1e-6, 1e-6, 20000), exact)), 1.5);

  // Whole exponents are exact; the ties of rounding to a whole number are not far off.
  for (int n = int(lowest); n <= 127; ++n) {
    EXPECT_EQ(apply(v.exp2, v.width, Real(n)), std::ldexp(Real(1), n));
    if (n < 127) {
      const Real half = apply(v.exp2, v.width, Real(n + 0.5));
      EXPECT_NEAR(double(half) / std::exp2(n + 0.5), 1.0, 2 * std::numeric_limits<Real>::epsilon());
    }
  }
}
TEST_P(Math, Exp2IsAccurate) {
  for_each_vec(isa(), [](const auto& v) { check_exp2(v); });
}

template <class Real>
void check_exp2_specials(const VecProbe<Real>& v) {
  const Real tiny = std::numeric_limits<Real>::min();
  EXPECT_EQ(apply(v.exp2, v.width, Real(0)), Real(1));
  EXPECT_EQ(apply(v.exp2, v.width, -Real(0)), Real(1));
  const Real zero = apply(v.exp2, v.width, -kInf<Real>);
  EXPECT_EQ(zero, Real(0));
  EXPECT_FALSE(std::signbit(zero));
  EXPECT_TRUE(std::isnan(apply(v.exp2, v.width, std::numeric_limits<Real>::quiet_NaN())));
  EXPECT_TRUE(std::isnan(apply(v.exp2, v.width, -std::numeric_limits<Real>::quiet_NaN())));
  // Far below, and around the smallest normal number: never negative, never above it.
  for (double x :
       {-1e4, -1e10, -3e38, sizeof(Real) == 4 ? -126.5 : -1022.5, sizeof(Real) == 4 ? -150.0 : -1080.0}) {
    const Real r = apply(v.exp2, v.width, Real(x));
    EXPECT_GE(r, Real(0)) << x;
    EXPECT_LE(r, tiny) << x;
  }
  for (double x : {-2000.0, -1e10, -3e38}) EXPECT_EQ(apply(v.exp2, v.width, Real(x)), Real(0)) << x;
  EXPECT_EQ(apply(v.exp2, v.width, -std::numeric_limits<Real>::max()), Real(0));
}
TEST_P(Math, Exp2Specials) {
  for_each_vec(isa(), [](const auto& v) { check_exp2_specials(v); });
}

// softmax relies on it: a larger score never gets a smaller weight, and no weight exceeds 1.
template <class Real>
void check_exp2_order(const VecProbe<Real>& v) {
  for (double x : uniform<Real>(-30, 0, 4000)) {
    const Real here = apply(v.exp2, v.width, Real(x));
    EXPECT_LE(here, Real(1));
    EXPECT_GT(here, Real(0));
  }
  EXPECT_LE(apply(v.exp2, v.width, -std::numeric_limits<Real>::denorm_min()), Real(1));
  EXPECT_LE(apply(v.exp2, v.width, -std::numeric_limits<Real>::epsilon()), Real(1));
}
TEST_P(Math, Exp2OfNegativesStaysBelowOne) {
  for_each_vec(isa(), [](const auto& v) { check_exp2_order(v); });
}

template <class Real>
void check_tanh(const VecProbe<Real>& v) {
  const auto exact = [](long double x) { return std::tanh(x); };
  EXPECT_LE((worst_ulp<Real>(v.tanh, v.width, uniform<Real>(-0.7, 0.7, 80000), exact)), 3.0);
  EXPECT_LE((worst_ulp<Real>(v.tanh, v.width, uniform<Real>(-12, 12, 80000), exact)), 3.5);
  EXPECT_LE((worst_ulp<Real>(v.tanh, v.width, uniform<Real>(-1e-5, 1e-5, 20000), exact)), 3.0);
  for (Real x : uniform<Real>(-50, 50, 4000)) {
    const Real r = apply(v.tanh, v.width, x);
    EXPECT_LE(std::abs(r), Real(1)) << x;
    EXPECT_EQ(r, -apply(v.tanh, v.width, -x)) << x;  // odd
  }
  EXPECT_EQ(apply(v.tanh, v.width, Real(0)), Real(0));
  EXPECT_EQ(apply(v.tanh, v.width, kInf<Real>), Real(1));
  EXPECT_EQ(apply(v.tanh, v.width, -kInf<Real>), Real(-1));
  EXPECT_EQ(apply(v.tanh, v.width, std::numeric_limits<Real>::max()), Real(1));
  EXPECT_TRUE(std::isnan(apply(v.tanh, v.width, std::numeric_limits<Real>::quiet_NaN())));
}
TEST_P(Math, TanhIsAccurate) {
  for_each_vec(isa(), [](const auto& v) { check_tanh(v); });
}

}  // namespace
}  // namespace fae::cpu
