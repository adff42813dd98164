// Packing: where each element of a strided matrix ends up, and what is finite.
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "guarded.h"
#include "isa_test.h"

namespace fae::cpu {
namespace {

using fae::testing::Guarded;
using probe::ProductProbe;
using probe::Source;

// A matrix in guarded memory: either rows apart, or transposed, so that columns are apart.
template <class S>
struct Matrix {
  Guarded<S> memory;
  Source<S> source;
  int64_t rows, columns;

  Matrix(int64_t rows, int64_t columns, bool transposed, int64_t gap = 0)
      : memory(transposed ? size_t(columns * (rows + gap) - gap) : size_t(rows * (columns + gap) - gap)),
        rows(rows),
        columns(columns) {
    source =
        transposed ? Source<S>{memory.data(), 1, rows + gap} : Source<S>{memory.data(), columns + gap, 1};
    // Small whole numbers: exact in every storage type.
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; ++c) at(r, c) = from_double<S>(double((r * 31 + c * 7) % 201 - 100));
    }
  }
  S& at(int64_t r, int64_t c) { return memory[size_t(r * source.row + c * source.column)]; }
  double value(int64_t r, int64_t c) { return to_float(at(r, c)); }
};

// Element (depth d, column c) of panels [columns / panel][depth / pair, in whole steps of
// p.depth][panel][pair].
template <class Probe>
size_t panel_index(const Probe& p, int64_t depth, int64_t d, int64_t c) {
  const int64_t steps = (depth + p.depth - 1) / p.depth * p.depth / p.pair;
  return size_t(((c / p.panel * steps + d / p.pair) * p.panel + c % p.panel) * p.pair + d % p.pair);
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class Probe, class Fn>
void for_each_matrix(const Probe& p, Fn&& fn) {
  const int64_t w = p.width;
  for (int64_t n :
       {int64_t(1), int64_t(2), w - 1, w, w + 1, 2 * w + 3, p.panel, p.panel + 1, 2 * p.panel - 1}) {
    for (int64_t depth : {int64_t(1), int64_t(2), int64_t(3), w, w + 1, 2 * w - 1, 2 * w, 4 * w + 1}) {
      for (bool transposed : {false, true}) fn(n, depth, transposed);
    }
  }
}

FAE_ISA_SUITE(Pack);

template <class Real, class Operand, class S>
void check_transposed(const ProductProbe<Real, Operand, S>& p) {
  SCOPED_TRACE(p.name);
  for_each_matrix(p, [&](int64_t n, int64_t depth, bool transposed) {
    Matrix<S> m(n, depth, transposed, 3);
    Guarded<Operand> packed(size_t(p.panel_operands(n, depth)));
    p.pack_transposed(m.source, n, depth, packed.data());
    for (int64_t c = 0; c < round_up(n, p.width); ++c) {
      for (int64_t d = 0; d < round_up(depth, p.depth); ++d) {
        const double wanted = c < n && d < depth ? m.value(c, d) : 0.0;
        ASSERT_EQ(double(to_float(packed[panel_index(p, depth, d, c)])), wanted)
            << n << 'x' << depth << ": " << c << ',' << d;
      }
    }
  });
}
TEST_P(Pack, TransposedPanels) {
  for_each_product(isa(), [](const auto& p) { check_transposed(p); });
}

template <class Real, class Operand, class S>
void check_rows(const ProductProbe<Real, Operand, S>& p) {
  SCOPED_TRACE(p.name);
  for_each_matrix(p, [&](int64_t n, int64_t depth, bool transposed) {
    Matrix<S> m(depth, n, transposed, 1);
    Guarded<Operand> packed(size_t(p.panel_operands(n, depth)));
    ASSERT_TRUE(p.pack_rows(m.source, depth, n, packed.data()));
    for (int64_t c = 0; c < round_up(n, p.width); ++c) {
      for (int64_t d = 0; d < round_up(depth, p.depth); ++d) {
        const double wanted = c < n && d < depth ? m.value(d, c) : 0.0;
        ASSERT_EQ(double(to_float(packed[panel_index(p, depth, d, c)])), wanted)
            << n << 'x' << depth << ": " << c << ',' << d;
      }
    }
    // Clearing a row leaves all others alone.
    const int64_t k = depth / 2;
    p.clear_packed_row(packed.data(), depth, n, k);
    for (int64_t c = 0; c < n; ++c) {
      for (int64_t d = 0; d < depth; ++d) {
        ASSERT_EQ(double(to_float(packed[panel_index(p, depth, d, c)])), d == k ? 0.0 : m.value(d, c));
      }
    }
  });
}
TEST_P(Pack, RowPanels) {
  for_each_product(isa(), [](const auto& p) { check_rows(p); });
}

template <class Real, class Operand, class S>
void check_operand(const ProductProbe<Real, Operand, S>& p) {
  SCOPED_TRACE(p.name);
  for_each_matrix(p, [&](int64_t n, int64_t depth, bool transposed) {
    Matrix<S> m(n, depth, transposed);
    const int64_t ld = round_up(depth, p.depth);
    Guarded<Operand> packed(size_t(n * ld));
    p.pack_operand(m.source, n, depth, packed.data());
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t d = 0; d < ld; ++d) {
        ASSERT_EQ(double(to_float(packed[size_t(r * ld + d)])), d < depth ? m.value(r, d) : 0.0)
            << r << ',' << d;
      }
    }
  });
}
TEST_P(Pack, RowOperands) {
  for_each_product(isa(), [](const auto& p) { check_operand(p); });
}

// One special value anywhere is noticed; the largest finite ones are not.
template <class Real, class Operand, class S>
void check_finite(const ProductProbe<Real, Operand, S>& p) {
  SCOPED_TRACE(p.name);
  const int64_t depth = 5, n = p.panel + p.width + 1;
  for (bool transposed : {false, true}) {
    for (double special : {std::nan(""), double(INFINITY), -double(INFINITY)}) {
      for (int64_t d = 0; d < depth; ++d) {
        for (int64_t c = 0; c < n; ++c) {
          Matrix<S> m(depth, n, transposed);
          m.at(d, c) = from_double<S>(special);
          std::vector<Operand> packed(size_t(p.panel_operands(n, depth)));
          ASSERT_FALSE(p.pack_rows(m.source, depth, n, packed.data())) << special << " at " << d << ',' << c;
          int64_t indices[16];
          ASSERT_EQ(p.find_special_rows(m.source, depth, n, indices), 1);
          ASSERT_EQ(indices[0], d);
          c += c % 3;  // not every column of every row
        }
      }
    }
    Matrix<S> m(depth, n, transposed);
    const double largest = sizeof(S) == 8                     ? std::numeric_limits<double>::max()
                           : std::is_same<S, Float16>::value  ? 65504.0
                           : std::is_same<S, BFloat16>::value ? 3.38953139e38
                                                              : double(std::numeric_limits<float>::max());
    for (int64_t d = 0; d < depth; ++d) {
      for (int64_t c = 0; c < n; ++c) m.at(d, c) = from_double<S>(c % 2 ? largest : -largest);
    }
    std::vector<Operand> packed(size_t(p.panel_operands(n, depth)));
    EXPECT_TRUE(p.pack_rows(m.source, depth, n, packed.data()));
    int64_t indices[16];
    EXPECT_EQ(p.find_special_rows(m.source, depth, n, indices), 0);
  }
}
TEST_P(Pack, NoticesWhatIsNotFinite) {
  for_each_product(isa(), [](const auto& p) { check_finite(p); });
}

template <class Real, class Operand, class S>
void check_store_row(const ProductProbe<Real, Operand, S>& p) {
  SCOPED_TRACE(p.name);
  std::vector<Real> lanes(static_cast<size_t>(p.width));
  for (size_t i = 0; i < lanes.size(); ++i) lanes[i] = Real(i + 1);
  for (int64_t stride : {1, 2, 5}) {
    for (int n = 1; n <= p.width; ++n) {
      Guarded<S> row(size_t((n - 1) * stride + 1));
      for (S& x : row) x = from_double<S>(-1);
      p.store_row(row.data(), stride, lanes.data(), n);
      for (size_t i = 0; i < row.size(); ++i) {
        const double wanted = int64_t(i) % stride ? -1.0 : double(int64_t(i) / stride + 1);
        ASSERT_EQ(double(to_float(row[i])), wanted) << stride << ' ' << n << ' ' << i;
      }
    }
  }
}
TEST_P(Pack, StoresRowsOfAnyStride) {
  for_each_product(isa(), [](const auto& p) { check_store_row(p); });
}

}  // namespace
}  // namespace fae::cpu
