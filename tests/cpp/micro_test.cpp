// The micro-kernel for every tile shape and update against plain loops; and the packed
// product as the kernels put it together.
#include <algorithm>
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
using probe::TileProduct;
using probe::Update;

template <class S>
void fill(S* p, size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  for (size_t i = 0; i < n; ++i) p[i] = from_double<S>(normal(random));
}

FAE_ISA_SUITE(Micro);

template <class Real, class Operand, class S>
void check_tiles(const ProductProbe<Real, Operand, S>& p) {
  SCOPED_TRACE(p.name);
  const int64_t ldb = p.panel * p.pair;
  const int64_t whole = p.depth / p.pair;
  for (int64_t depth : {int64_t(0), whole, 2 * whole, 7 * whole, (32 + whole) / whole * whole}) {  // steps
    for (bool transposed : {false, true}) {
      if (transposed && !p.strided) continue;
      for (int rows = 1; rows <= p.tile_rows; ++rows) {
        for (int vecs = 1; vecs <= p.tile_vecs; ++vecs) {
          const int columns = vecs * p.width;
          // A row-major, or with rows next to each other as when P^T is read; both guarded.
          const int64_t a_row = transposed ? p.pair : depth * p.pair + 2;
          const int64_t a_depth = transposed ? (rows + 1) * p.pair : p.pair;
          Guarded<Operand> a(depth ? size_t((rows - 1) * a_row + (depth - 1) * a_depth + p.pair) : 0);
          Guarded<Operand> b(depth ? size_t((depth - 1) * ldb + columns * p.pair) : 0);
          const int64_t ldc = columns + 3;
          Guarded<Real> c(size_t((rows - 1) * ldc + columns));
          fill(a.data(), a.size(), 1);
          fill(b.data(), b.size(), 2);
          for (Update update : {Update::kStore, Update::kAdd}) {
            fill(c.data(), c.size(), 3);
            const std::vector<Real> before(c.begin(), c.end());
            p.multiply(
                update, rows, vecs,
                TileProduct<Real, Operand>{depth, a.data(), a_row, a_depth, b.data(), ldb, c.data(), ldc, 0});
            for (int r = 0; r < rows; ++r) {
              for (int j = 0; j < (r + 1 < rows ? ldc : columns); ++j) {
                const double old = before[size_t(r * ldc + j)];
                if (j >= columns) {
                  ASSERT_EQ(c[size_t(r * ldc + j)], Real(old)) << "written past the tile";
                  continue;
                }
                double wanted = update == Update::kStore ? 0 : old;
                double size = std::fabs(wanted) + 1;
                for (int64_t d = 0; d < depth; ++d) {
                  for (int e = 0; e < p.pair; ++e) {
                    const double x = to_float(a[size_t(r * a_row + d * a_depth + e)]);
                    const double y = to_float(b[size_t(d * ldb + j * p.pair + e)]);
                    wanted += x * y;
                    size += std::fabs(x * y);
                  }
                }
                ASSERT_NEAR(double(c[size_t(r * ldc + j)]), wanted,
                            size * 4 * double(std::numeric_limits<Real>::epsilon()))
                    << rows << 'x' << vecs << " depth " << depth << " at " << r << ',' << j;
              }
            }
          }
        }
      }
    }
  }
}
TEST_P(Micro, EveryTileShape) {
  for_each_product(isa(), [](const auto& p) { check_tiles(p); });
}

// Steps of zeros before the others may be left out: no bit changes.
template <class Real, class Operand, class S>
void check_leading_zeros(const ProductProbe<Real, Operand, S>& p) {
  SCOPED_TRACE(p.name);
  const int64_t whole = p.depth / p.pair, depth = 200 / whole * whole;
  const int64_t a_row = depth * p.pair, ldb = p.panel * p.pair;
  const int columns = p.tile_vecs * p.width;
  for (int64_t zeros = 0; zeros < depth; zeros += whole) {
    Guarded<Operand> a(size_t(p.tile_rows * a_row)), b(size_t(depth * ldb));
    fill(a.data(), a.size(), 1);
    fill(b.data(), b.size(), 2);
    for (int r = 0; r < p.tile_rows; ++r)
      std::fill_n(a.data() + r * a_row, size_t(zeros * p.pair), Operand{});
    std::vector<Real> all(size_t(p.tile_rows * columns), Real(0.3)), rest = all;
    p.multiply(
        Update::kAdd, p.tile_rows, p.tile_vecs,
        TileProduct<Real, Operand>{depth, a.data(), a_row, p.pair, b.data(), ldb, all.data(), columns, 0});
    p.multiply(Update::kAdd, p.tile_rows, p.tile_vecs,
               TileProduct<Real, Operand>{depth - zeros, a.data() + zeros * p.pair, a_row, p.pair,
                                          b.data() + zeros * ldb, ldb, rest.data(), columns, zeros});
    ASSERT_EQ(all, rest) << zeros;
  }
}
TEST_P(Micro, LeadingZerosChangeNoBit) {
  for_each_product(isa(), [](const auto& p) { check_leading_zeros(p); });
}

// Q K^T from strided storage: pack_operand, pack_transposed and all tiles of a ragged shape.
template <class Real, class Operand, class S>
void check_packed(const ProductProbe<Real, Operand, S>& p) {
  SCOPED_TRACE(p.name);
  for (int64_t depth : {1, 3, 17, 64}) {
    const int64_t m = p.tile_rows + 1, n = p.panel + p.width + 1;
    Guarded<S> q(size_t(m * depth)), k(size_t(n * depth));
    fill(q.data(), q.size(), 5);
    fill(k.data(), k.size(), 6);
    const int64_t steps = (depth + p.depth - 1) / p.depth * p.depth / p.pair;
    std::vector<Operand> a(size_t(m * steps * p.pair)), b(size_t(p.panel_operands(n, depth)));
    p.pack_operand(Source<S>{q.data(), depth, 1}, m, depth, a.data());
    p.pack_transposed(Source<S>{k.data(), depth, 1}, n, depth, b.data());
    const int64_t ld = (n + p.width - 1) / p.width * p.width;
    std::vector<Real> c(size_t(m * ld));
    for (int64_t r = 0; r < m; r += p.tile_rows) {
      for (int64_t j = 0; j < ld; j += p.panel) {
        const int64_t columns = std::min(p.panel, ld - j);
        p.multiply(Update::kStore, int(std::min<int64_t>(p.tile_rows, m - r)), int(columns / p.width),
                   TileProduct<Real, Operand>{steps, a.data() + r * steps * p.pair, steps * p.pair, p.pair,
                                              b.data() + j / p.panel * steps * p.panel * p.pair,
                                              p.panel * p.pair, c.data() + r * ld + j, ld, 0});
      }
    }
    for (int64_t r = 0; r < m; ++r) {
      for (int64_t j = 0; j < ld; ++j) {
        double wanted = 0, size = 1e-30;
        for (int64_t d = 0; j < n && d < depth; ++d) {
          const double x =
              double(to_float(q[size_t(r * depth + d)])) * double(to_float(k[size_t(j * depth + d)]));
          wanted += x;
          size += std::fabs(x);
        }
        ASSERT_NEAR(double(c[size_t(r * ld + j)]), wanted,
                    size * 4 * double(std::numeric_limits<Real>::epsilon()));
      }
    }
  }
}
TEST_P(Micro, PackedProduct) {
  for_each_product(isa(), [](const auto& p) { check_packed(p); });
}

}  // namespace
}  // namespace fae::cpu
