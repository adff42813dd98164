// Matrix instructions: gather the warp's registers into matrices by fragment.h, compute,
// scatter.
#include <cstring>

#include "core/dtype.h"
#include "cuda/emu/block.h"
#include "cuda/emu/fragment.h"
#include "cuda/emu/ldmatrix.h"
#include "cuda/emu/mma.h"

namespace fae::cuda::emu {
namespace {

struct LdmatrixArgs {
  uint32_t* out;
  uint32_t row;
};

template <bool kTransposed>
void ldmatrix(Thread* lanes, Block& block) {
  const Where where = lanes[0].where;
  const char* const op = name_of(lanes[0].op);
  ++instructions().ldmatrix;
  uint16_t matrix[4][8][8];
  WarpAccess access{~0u, 16, {}};
  for (int lane = 0; lane < int(kLanes); ++lane) {
    const uint32_t row = static_cast<const LdmatrixArgs*>(lanes[lane].args)->row;
    block.shared.read(row, 16, block.stamp(lanes[lane].index), where, op);
    memcpy(matrix[lane / 8][lane % 8], block.shared.data(row), 16);
    access.address[size_t(lane)] = row;
  }
  if (block.options.count) block.recorder.note_warp(Space::kShared, op, where, access);
  for (int lane = 0; lane < int(kLanes); ++lane) {
    constexpr bool t = kTransposed;
    const Element low = ldmatrix_element(lane, 0, t), high = ldmatrix_element(lane, 1, t);
    uint32_t* const out = static_cast<const LdmatrixArgs*>(lanes[lane].args)->out;
    for (int m = 0; m < 4; ++m) {
      out[m] = uint32_t(matrix[m][low.row][low.column]) | uint32_t(matrix[m][high.row][high.column]) << 16;
    }
  }
}

struct MmaArgs {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// Storage of an operand element, and its value.
struct Half {
  using Bits = uint16_t;
  static float value(Bits x) { return to_float(Float16{x}); }
};
struct Brain {
  using Bits = uint16_t;
  static float value(Bits x) { return to_float(BFloat16{x}); }
};
struct Tf32 {
  using Bits = uint32_t;
  static float value(Bits x) { return bit_cast<float>(x & 0xffffe000u); }
};

// d += a b. Products are exact; an element's products and its accumulator are summed in
// double and rounded once. Hardware aligns and truncates the terms of a sum, so the last
// bits differ wherever a sum is not exact in fp32.
template <int kDepth>
void multiply_add(float (&d)[16][8], const float (&a)[16][kDepth], const float (&b)[kDepth][8]) {
  double wide_b[kDepth][8];
  for (int k = 0; k < kDepth; ++k) {
    for (int j = 0; j < 8; ++j) wide_b[k][j] = b[k][j];
  }
  for (int i = 0; i < 16; ++i) {
    double sum[8] = {};
    for (int k = 0; k < kDepth; ++k) {
      const double x = a[i][k];
      for (int j = 0; j < 8; ++j) sum[j] += x * wide_b[k][j];
    }
    for (int j = 0; j < 8; ++j) d[i][j] = float(d[i][j] + sum[j]);
  }
}

template <class Type, class Bits, size_t kRows, size_t kColumns>
void widen(float (&to)[kRows][kColumns], const Bits (&from)[kRows][kColumns]) {
  for (size_t i = 0; i < kRows; ++i) {
    for (size_t j = 0; j < kColumns; ++j) to[i][j] = Type::value(from[i][j]);
  }
}

template <class Type>
void mma(Thread* lanes, Block&) {
  using Bits = typename Type::Bits;
  constexpr bool kPairs = sizeof(Bits) == 2;
  constexpr int kDepth = kPairs ? 16 : 8;
  ++instructions().mma;
  alignas(64) Bits a_bits[16][kDepth], b_bits[kDepth][8];
  alignas(64) float a[16][kDepth], b[kDepth][8], d[16][8];
  for (int lane = 0; lane < int(kLanes); ++lane) {
    const auto& args = *static_cast<const MmaArgs*>(lanes[lane].args);
    for (int r = 0; r < 4; ++r) {
      if constexpr (kPairs) {
        const Element low = mma_a16(lane, r, 0), high = mma_a16(lane, r, 1);
        a_bits[low.row][low.column] = Bits(args.a[r]);
        a_bits[high.row][high.column] = Bits(args.a[r] >> 16);
      } else {
        const Element e = mma_a32(lane, r);
        a_bits[e.row][e.column] = args.a[r];
      }
      const Element e = mma_d(lane, r);
      d[e.row][e.column] = args.d[r];
    }
    for (int r = 0; r < 2; ++r) {
      if constexpr (kPairs) {
        const Element low = mma_b16(lane, r, 0), high = mma_b16(lane, r, 1);
        b_bits[low.row][low.column] = Bits(args.b[r]);
        b_bits[high.row][high.column] = Bits(args.b[r] >> 16);
      } else {
        const Element e = mma_b32(lane, r);
        b_bits[e.row][e.column] = args.b[r];
      }
    }
  }
  widen<Type>(a, a_bits);
  widen<Type>(b, b_bits);
  multiply_add<kDepth>(d, a, b);
  for (int lane = 0; lane < int(kLanes); ++lane) {
    float* const out = static_cast<const MmaArgs*>(lanes[lane].args)->d;
    for (int r = 0; r < 4; ++r) {
      const Element e = mma_d(lane, r);
      out[r] = d[e.row][e.column];
    }
  }
}

}  // namespace

void ldmatrix_x4(uint32_t (&out)[4], uint32_t row, bool transposed, Where where) {
  LdmatrixArgs args{out, row};
  Block& block = this_block();
  if (transposed) block.wait_in_warp(Op::kLdmatrixTransposed, where, &args, ldmatrix<true>);
  else block.wait_in_warp(Op::kLdmatrix, where, &args, ldmatrix<false>);
}

void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  MmaArgs args{d, a, b};
  this_block().wait_in_warp(Op::kMmaF16, where, &args, mma<Half>);
}

void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  MmaArgs args{d, a, b};
  this_block().wait_in_warp(Op::kMmaBf16, where, &args, mma<Brain>);
}

void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  MmaArgs args{d, a, b};
  this_block().wait_in_warp(Op::kMmaTf32, where, &args, mma<Tf32>);
}

}  // namespace fae::cuda::emu
