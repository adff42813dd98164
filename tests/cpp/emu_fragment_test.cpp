// Fragment layouts against the PTX ISA's description, and the instructions that use them.
#include "cuda/emu/fragment.h"

#include <random>
#include <vector>

#include "emu_test.h"

namespace fae::cuda::testing {
namespace {

using EmuFragment = EmulatorTest;
using emu::Element;

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": the elements a0..a7
// of a lane lie at these rows and columns.
TEST_F(EmuFragment, LayoutsOfMmaAreThoseOfThePtxIsa) {
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
      const int column = in_group * 2 + (i & 1) + (i < 4 ? 0 : 8);
      EXPECT_EQ(emu::mma_a16(lane, i / 2, i % 2), (Element{row, column}));
    }
    for (int i = 0; i < 4; ++i) {
      EXPECT_EQ(emu::mma_b16(lane, i / 2, i % 2), (Element{in_group * 2 + (i & 1) + (i < 2 ? 0 : 8), group}));
      EXPECT_EQ(emu::mma_d(lane, i), (Element{i < 2 ? group : group + 8, in_group * 2 + (i & 1)}));
      // mma.m16n8k8 with .tf32
      EXPECT_EQ(emu::mma_a32(lane, i),
                (Element{i == 0 || i == 2 ? group : group + 8, in_group + (i < 2 ? 0 : 4)}));
    }
    for (int i = 0; i < 2; ++i) EXPECT_EQ(emu::mma_b32(lane, i), (Element{in_group + (i ? 4 : 0), group}));
  }
}

// Every element of a matrix is held exactly once (of the operands, too).
TEST_F(EmuFragment, LayoutsAreBijections) {
  const auto expect_all = [](int rows, int columns, int registers, auto&& element) {
    std::vector<int> held(size_t(rows * columns), 0);
    for (int lane = 0; lane < 32; ++lane) {
      for (int r = 0; r < registers; ++r) {
        const Element e = element(lane, r);
        ++held.at(size_t(e.row * columns + e.column));
      }
    }
    EXPECT_EQ(held, std::vector<int>(held.size(), 1));
  };
  expect_all(16, 8, 4, [](int lane, int r) { return emu::mma_d(lane, r); });
  expect_all(16, 16, 8, [](int lane, int r) { return emu::mma_a16(lane, r / 2, r % 2); });
  expect_all(16, 8, 4, [](int lane, int r) { return emu::mma_b16(lane, r / 2, r % 2); });
  expect_all(16, 8, 4, [](int lane, int r) { return emu::mma_a32(lane, r); });
  expect_all(8, 8, 2, [](int lane, int r) { return emu::mma_b32(lane, r); });
  for (bool transposed : {false, true}) {
    expect_all(8, 8, 2, [&](int lane, int r) { return emu::ldmatrix_element(lane, r, transposed); });
  }
}

// "Each thread ... row = laneid / 4, elements 2 (laneid % 4) and the next"; rows of matrix m
// at the addresses of lanes 8 m to 8 m + 7. With .trans the same of the transposed matrix.
TEST_F(EmuFragment, MatrixLoads) {
  launch({32, 512}, [] {
    const int lane = lane_index();
    // Element (row, column) of matrix m is 100 m + 10 row + column; rows lie in a mixed order.
    const auto row_address = [](int m, int row) { return shared_memory() + ((m * 8 + row) * 5 % 32) * 16; };
    for (int c = 0; c < 8; ++c) {
      store_shared((row_address(lane / 8, lane % 8) + 2 * c).as<uint16_t>(),
                   uint16_t(100 * (lane / 8) + 10 * (lane % 8) + c));
    }
    warp_barrier();
    uint32_t plain[4], transposed[4];
    ldmatrix_x4(plain, row_address(lane / 8, lane % 8));
    ldmatrix_x4_transposed(transposed, row_address(lane / 8, lane % 8));
    for (int m = 0; m < 4; ++m) {
      const int r = lane / 4, c = lane % 4 * 2, base = 100 * m;
      EXPECT_EQ(plain[m], uint32_t(base + 10 * r + c) | uint32_t(base + 10 * r + c + 1) << 16);
      EXPECT_EQ(transposed[m], uint32_t(base + 10 * c + r) | uint32_t(base + 10 * (c + 1) + r) << 16);
    }
  });
  EXPECT_EQ(emu::instructions().ldmatrix, 2u);
}

// Integers small enough that every partial sum is exact, whatever the order.
template <int kDepth>
struct Product {
  float a[16][kDepth], b[kDepth][8], c[16][8], d[16][8];
  explicit Product(uint64_t seed) {
    std::mt19937_64 random(seed);
    const auto fill = [&](float* x, int n) {
      for (int i = 0; i < n; ++i) x[i] = float(int(random() % 33) - 16);
    };
    fill(a[0], 16 * kDepth);
    fill(b[0], kDepth * 8);
    fill(c[0], 16 * 8);
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) {
        d[i][j] = c[i][j];
        for (int k = 0; k < kDepth; ++k) d[i][j] += a[i][k] * b[k][j];
      }
    }
  }
};

template <int kDepth, class Fill, class Mma>
void expect_product(const Fill& fill, const Mma& mma) {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    emu::options().seed = seed;
    const Product<kDepth> p(seed);
    launch({64, 0}, [&] {
      const int lane = lane_index();
      float d[4];
      for (int e = 0; e < 4; ++e) d[e] = p.c[emu::mma_d(lane, e).row][emu::mma_d(lane, e).column];
      uint32_t a[4], b[2];
      fill(p, lane, a, b);
      mma(d, a, b);
      for (int e = 0; e < 4; ++e) {
        EXPECT_EQ(d[e], p.d[emu::mma_d(lane, e).row][emu::mma_d(lane, e).column]);
      }
    });
  }
}

template <class T>
void fill_pairs(const Product<16>& p, int lane, uint32_t (&a)[4], uint32_t (&b)[2]) {
  for (int r = 0; r < 4; ++r) {
    const Element e = emu::mma_a16(lane, r, 0);
    a[r] = pack_pair(T{}, p.a[e.row][e.column], p.a[e.row][e.column + 1]);
  }
  for (int r = 0; r < 2; ++r) {
    const Element e = emu::mma_b16(lane, r, 0);
    b[r] = pack_pair(T{}, p.b[e.row][e.column], p.b[e.row + 1][e.column]);
  }
}

TEST_F(EmuFragment, Products) {
  expect_product<16>(fill_pairs<Float16>, [](auto& d, auto& a, auto& b) { mma_m16n8k16_f16(d, a, b); });
  expect_product<16>(fill_pairs<BFloat16>, [](auto& d, auto& a, auto& b) { mma_m16n8k16_bf16(d, a, b); });
  const auto fill = [](const Product<8>& p, int lane, uint32_t (&a)[4], uint32_t (&b)[2]) {
    for (int r = 0; r < 4; ++r) a[r] = to_tf32(p.a[emu::mma_a32(lane, r).row][emu::mma_a32(lane, r).column]);
    for (int r = 0; r < 2; ++r) b[r] = to_tf32(p.b[emu::mma_b32(lane, r).row][emu::mma_b32(lane, r).column]);
    // TF32 has 19 bits: what stands in the others means nothing.
    for (uint32_t& x : a) x |= 0x1fffu;
    for (uint32_t& x : b) x |= 0x155u;
  };
  expect_product<8>(fill, [](auto& d, auto& a, auto& b) { mma_m16n8k8_tf32(d, a, b); });
  EXPECT_EQ(emu::instructions().mma, 3 * 4 * 2u);
}

TEST_F(EmuFragment, ProductsOfSpecialValues) {
  launch({}, [] {
    const float inf = __builtin_inff();
    float d[4] = {0, inf, 1, -0.0f};
    const uint32_t zero[4] = {}, b[2] = {};
    mma_m16n8k16_f16(d, zero, b);
    EXPECT_EQ(d[1], inf);
    // fp16's smallest subnormal, 2^-24, sixteen times against 1.
    const uint32_t tiny[4] = {0x00010001u, 0x00010001u, 0x00010001u, 0x00010001u};
    const uint32_t one[2] = {0x3c003c00u, 0x3c003c00u};
    float sum[4] = {};
    mma_m16n8k16_f16(sum, tiny, one);
    for (float x : sum) EXPECT_EQ(x, 0x1p-20f);
    const uint32_t infinite[4] = {0x7f807f80u, 0x7f807f80u, 0x7f807f80u, 0x7f807f80u};
    float bad[4] = {};
    mma_m16n8k16_bf16(bad, infinite, b);  // infinity times zero
    for (float x : bad) EXPECT_NE(x, x);
  });
}

}  // namespace
}  // namespace fae::cuda::testing
