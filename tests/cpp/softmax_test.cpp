// Online softmax of one row, fed in pieces.
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "isa_test.h"

namespace fae::cpu {
namespace {

using probe::ProductProbe;

constexpr double kLog2E = 1.4426950408889634;

template <class Real>
constexpr Real kInf = std::numeric_limits<Real>::infinity();

// Relative error of exp(-gap): its argument carries a rounding error that grows with it,
// and 16-bit operands round the result.
template <class Real, class Operand>
double weight_tolerance(double gap) {
  return (sizeof(Operand) == 2 ? 1.0 / 256 : 0.0) +
         (8 + 2 * gap) * double(std::numeric_limits<Real>::epsilon());
}

FAE_ISA_SUITE(Softmax);

template <class Real, class Operand, class S>
void check_row(const ProductProbe<Real, Operand, S>& p, double scale, int hidden_every, int pieces) {
  std::mt19937 random(uint32_t(pieces * 100 + hidden_every));
  std::normal_distribution<double> normal(0, 5);
  Real max = -kInf<Real>, sum = 0;
  std::vector<double> scores;
  std::vector<double> weights;  // as if the sum were never rescaled: exp(s - max so far)
  for (int piece = 0; piece < pieces; ++piece) {
    const int64_t columns = p.columns * int64_t(1 + random() % 7);
    std::vector<Real> s(static_cast<size_t>(columns));
    for (Real& x : s) {
      const bool hidden = hidden_every && random() % uint32_t(hidden_every) == 0;
      x = hidden ? -kInf<Real> : Real(normal(random));
    }
    std::vector<Operand> out(static_cast<size_t>(columns));
    const Real alpha = p.softmax_row(s.data(), columns, Real(scale * kLog2E), &max, &sum, out.data());
    for (double& w : weights) w *= double(alpha);
    for (size_t j = 0; j < s.size(); ++j) {
      scores.push_back(double(s[j]) * scale);
      weights.push_back(double(to_float(out[j])));
    }
  }
  double largest = -INFINITY, total = 0;
  for (double s : scores) largest = std::max(largest, s);
  if (largest == -INFINITY) {
    EXPECT_EQ(max, -kInf<Real>);
    EXPECT_EQ(sum, Real(0));
    for (double w : weights) EXPECT_EQ(w, 0.0);
    return;
  }
  EXPECT_NEAR(double(max) * scale, largest, 1e-6 * std::fabs(largest));
  for (double s : scores) total += std::exp(s - largest);
  EXPECT_NEAR(double(sum) / total, 1.0, 32 * double(std::numeric_limits<Real>::epsilon()));
  for (size_t j = 0; j < scores.size(); ++j) {
    if (scores[j] == -INFINITY) {
      EXPECT_EQ(weights[j], 0.0) << j;
      continue;
    }
    const double wanted = std::exp(scores[j] - largest);
    const double tolerance = weight_tolerance<Real, Operand>(largest - scores[j]);
    EXPECT_NEAR(weights[j], wanted, tolerance * wanted + 1e-30) << j;
  }
}
TEST_P(Softmax, InPiecesIsTheWhole) {
  for_each_product(isa(), [](const auto& p) {
    SCOPED_TRACE(p.name);
    for (double scale : {1.0, 0.125}) {
      for (int hidden_every : {0, 1, 2, 5}) {
        for (int pieces : {1, 2, 5}) check_row(p, scale, hidden_every, pieces);
      }
    }
  });
}

template <class Real, class Operand, class S>
void check_specials(const ProductProbe<Real, Operand, S>& p) {
  SCOPED_TRACE(p.name);
  const int64_t columns = std::max(2 * p.width, p.columns);
  std::vector<Operand> out(static_cast<size_t>(columns));
  // A NaN in any lane, before or after finite pieces, makes the row's sum NaN for good.
  for (int64_t lane = 0; lane < columns; ++lane) {
    std::vector<Real> broken(size_t(columns), Real(1)), fine(size_t(columns), Real(2));
    broken[size_t(lane)] = std::numeric_limits<Real>::quiet_NaN();
    for (bool first : {true, false}) {
      Real max = -kInf<Real>, sum = 0;
      p.softmax_row((first ? broken : fine).data(), columns, Real(1), &max, &sum, out.data());
      p.softmax_row((first ? fine : broken).data(), columns, Real(1), &max, &sum, out.data());
      EXPECT_TRUE(std::isnan(sum)) << lane;
    }
  }
  // Scores at the ends of the range: no overflow, no NaN.
  const Real huge = std::numeric_limits<Real>::max();
  std::vector<Real> s(size_t(columns), -huge);
  Real max = -kInf<Real>, sum = 0;
  p.softmax_row(s.data(), columns, Real(kLog2E), &max, &sum, out.data());
  EXPECT_EQ(max, -huge);
  EXPECT_EQ(sum, Real(columns));  // a whole row at the smallest value: uniform
  s.assign(size_t(columns), huge);
  const Real alpha = p.softmax_row(s.data(), columns, Real(kLog2E), &max, &sum, out.data());
  EXPECT_EQ(alpha, Real(0));
  EXPECT_EQ(sum, Real(columns));
}
TEST_P(Softmax, Specials) {
  for_each_product(isa(), [](const auto& p) { check_specials(p); });
}

// The same scores with hidden columns in front, by whole panels, give the same bits: the
// result of a row may not depend on where its tile begins.
template <class Real, class Operand, class S>
void check_shift(const ProductProbe<Real, Operand, S>& p) {
  SCOPED_TRACE(p.name);
  std::mt19937 random(9);
  std::normal_distribution<double> normal(0, 3);
  for (int64_t columns = p.columns; columns <= 5 * p.columns; columns += p.columns) {
    std::vector<Real> s(static_cast<size_t>(columns));
    for (Real& x : s) x = Real(normal(random));
    std::vector<Operand> out(size_t(columns + 2 * p.panel));
    Real max = -kInf<Real>, sum = 0;
    p.softmax_row(s.data(), columns, Real(kLog2E), &max, &sum, out.data());
    for (int64_t front : {p.panel, 2 * p.panel}) {
      for (int64_t back : {int64_t(0), int64_t(p.columns), p.panel}) {
        std::vector<Real> padded(size_t(front), -kInf<Real>);
        padded.insert(padded.end(), s.begin(), s.end());
        padded.insert(padded.end(), size_t(back), -kInf<Real>);
        std::vector<Operand> wide(padded.size());
        Real other_max = -kInf<Real>, other_sum = 0;
        p.softmax_row(padded.data(), int64_t(padded.size()), Real(kLog2E), &other_max, &other_sum,
                      wide.data());
        EXPECT_EQ(max, other_max);
        EXPECT_EQ(sum, other_sum) << columns << ' ' << front << ' ' << back;
      }
    }
  }
}
TEST_P(Softmax, DoesNotDependOnHiddenNeighbours) {
  for_each_product(isa(), [](const auto& p) { check_shift(p); });
}

}  // namespace
}  // namespace fae::cpu
