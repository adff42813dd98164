// Partial softmax results form a monoid: (max, sum, weighted values).
#include "core/partial.h"

#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <vector>

namespace fae {
namespace {

// A state together with one unnormalised weighted value, as a kernel would hold it.
template <class Real>
struct Part {
  SoftmaxState<Real> state;
  Real value = 0;
};

template <class Real>
Part<Real> part_of(const std::vector<Real>& scores, const std::vector<Real>& values) {
  Part<Real> p;
  for (Real s : scores) p.state.max = std::max(p.state.max, s);
  if (p.state.max == -std::numeric_limits<Real>::infinity()) return p;
  for (size_t i = 0; i < scores.size(); ++i) {
    const Real weight = std::exp(scores[i] - p.state.max);
    p.state.sum += weight;
    p.value += weight * values[i];
  }
  return p;
}

template <class Real>
Part<Real> join(const Part<Real>& a, const Part<Real>& b) {
  MergeFactors<Real> f;
  Part<Real> r;
  r.state = merge(a.state, b.state, &f);
  r.value = a.value * f.a + b.value * f.b;
  return r;
}

template <class Real>
void expect_same(const Part<Real>& a, const Part<Real>& b, Real tolerance) {
  EXPECT_EQ(a.state.max, b.state.max);
  EXPECT_NEAR(double(a.state.sum), double(b.state.sum), double(tolerance * (1 + std::abs(a.state.sum))));
  EXPECT_NEAR(double(a.value), double(b.value), double(tolerance * (1 + std::abs(a.value) + a.state.sum)));
}

template <class Real>
class Partial : public testing::Test {};
using Reals = testing::Types<float, double>;
class RealName {
 public:
  template <class T>
  static std::string GetName(int) {
    return sizeof(T) == 4 ? "float" : "double";
  }
};
TYPED_TEST_SUITE(Partial, Reals, RealName);

TYPED_TEST(Partial, EmptyIsTheIdentity) {
  const Part<TypeParam> empty, some = part_of<TypeParam>({1, -2, 30}, {4, 5, 6});
  for (const Part<TypeParam>& r : {join(empty, some), join(some, empty)}) {
    EXPECT_EQ(r.state.max, some.state.max);
    EXPECT_EQ(r.state.sum, some.state.sum);
    EXPECT_EQ(r.value, some.value);
  }
  const Part<TypeParam> nothing = join(empty, empty);
  EXPECT_EQ(nothing.state.sum, 0);
  EXPECT_EQ(nothing.value, 0);
  EXPECT_EQ(log_sum_exp(nothing.state), -std::numeric_limits<TypeParam>::infinity());
}

TYPED_TEST(Partial, AnySplitGivesTheWhole) {
  std::mt19937 random(1);
  std::normal_distribution<double> normal(0, 20);
  const TypeParam tolerance = 16 * std::numeric_limits<TypeParam>::epsilon();
  for (int round = 0; round < 200; ++round) {
    std::vector<TypeParam> s[3], v[3], all_s, all_v;
    for (int i = 0; i < 3; ++i) {
      for (int n = int(random() % 4); n > 0; --n) {
        // Some keys are hidden.
        const bool hidden = random() % 5 == 0;
        s[i].push_back(hidden ? -std::numeric_limits<TypeParam>::infinity() : TypeParam(normal(random)));
        v[i].push_back(TypeParam(normal(random)) / 20);
      }
      all_s.insert(all_s.end(), s[i].begin(), s[i].end());
      all_v.insert(all_v.end(), v[i].begin(), v[i].end());
    }
    const auto a = part_of(s[0], v[0]), b = part_of(s[1], v[1]), c = part_of(s[2], v[2]);
    const auto whole = part_of(all_s, all_v);
    expect_same(join(join(a, b), c), whole, tolerance);
    expect_same(join(a, join(b, c)), whole, tolerance);
    expect_same(join(join(c, a), b), whole, tolerance);
    // Commutative to the bit: the sum of two products does not depend on their order.
    EXPECT_EQ(join(a, b).state.sum, join(b, a).state.sum);
  }
}

TYPED_TEST(Partial, LogSumExpOfFarApartStates) {
  const auto far = part_of<TypeParam>({-30000}, {1}), near = part_of<TypeParam>({30000}, {2});
  const auto r = join(far, near);
  EXPECT_EQ(log_sum_exp(r.state), TypeParam(30000));
  EXPECT_EQ(r.value, 2);
}

TYPED_TEST(Partial, NanStaysNan) {
  Part<TypeParam> broken = part_of<TypeParam>({1}, {1});
  broken.state.sum = std::numeric_limits<TypeParam>::quiet_NaN();
  const auto whole = part_of<TypeParam>({5}, {1});
  EXPECT_TRUE(std::isnan(join(broken, whole).state.sum));
  EXPECT_TRUE(std::isnan(join(whole, broken).state.sum));
  EXPECT_TRUE(std::isnan(log_sum_exp(broken.state)));
}

}  // namespace
}  // namespace fae
