// Matrix operands of one warp, in the registers that mma.sync wants them in.
//
// A `step` is the depth of one instruction: 16 for 16-bit types, 8 for fp32. "rows" operands
// lie in shared memory with the depth along a row, "columns" operands with the depth down a
// column. For 16-bit types ldmatrix serves both. It cannot transpose 32-bit elements, so
// for fp32 columns operands are read one by one, and their depths in the order 0, 2, 4, 6,
// 1, 3, 5, 7: the order in which an accumulator is an A operand. A sum does not mind.
#pragma once

#include "cuda/prim/convert.h"
#include "cuda/prim/ldmatrix.h"
#include "cuda/prim/mma_sm80.h"
#include "cuda/tile/smem_tile.h"

namespace fae::cuda {

// 16 x 8 accumulator; element (row, column) = (lane / 4 + 8 (e / 2), 2 (lane % 4) + e % 2).
using FragC = float[4];

// The columns 2 t and 2 t + 1 of a row of a tile, where t is lane % 4: those of an accumulator's first 8.
template <class T, int kRows, int kCols>
FAE_DEVICE LaneChunk lane_pair(SmemTile<T, kRows, kCols> tile, int row) {
  using Tile = SmemTile<T, kRows, kCols>;
  const int t = lane_index() % 4;
  const LaneChunk chunk = tile.lane_chunk(row, 2 * t / Tile::kChunk);
  return {chunk.tile, chunk.offset + uint32_t(2 * t % Tile::kChunk * int(sizeof(T)))};
}

// Two elements of `Tile`, rounded, 8 * n columns to the right of `pair`.
template <class Tile>
FAE_DEVICE void store_pair(LaneChunk pair, int n, float x, float y) {
  using T = typename Tile::Element;
  const Smem<std::byte> at = Tile::move(pair, 0, n * (8 / Tile::kChunk)).at();
  if constexpr (sizeof(T) == 2) {
    store_shared(at.template as<uint32_t>(), pack_pair(T{}, x, y));
  } else {
    struct alignas(8) Pair { T x, y; };
    store_shared(at.template as<Pair>(), Pair{x, y});
  }
}

template <class T>
struct Mma {  // 16-bit types
  static constexpr int kStep = 16;
  struct A { uint32_t reg[4]; };  // 16 rows x kStep
  struct B { uint32_t reg[2]; };  // kStep x 8 columns

  template <bool kBFirst = false>
  static FAE_DEVICE void multiply(FragC& d, const A& a, const B& b, bool /*fast*/) {
    if constexpr (DTypeOf<T>::value == DType::kBFloat16) mma_m16n8k16_bf16(d, a.reg, b.reg);
    else mma_m16n8k16_f16(d, a.reg, b.reg);
  }

  // Where a lane's part of an operand begins, for one that begins at (row, depth 0); the
  // loads below add multiples of 16 to it.
  template <class Tile>
  static FAE_DEVICE LaneChunk a_rows(const Tile& tile, int row) {
    return tile.lane_chunk(row + lane_index() % 16, lane_index() / 16);
  }
  template <class Tile>
  static FAE_DEVICE LaneChunk a_columns(const Tile& tile, int row) {
    const int lane = lane_index();
    return Tile::move(tile.lane_chunk(lane % 8 + lane / 16 * 8, lane / 8 % 2), 0, row / 8);
  }
  template <class Tile>
  static FAE_DEVICE LaneChunk b_rows(const Tile& tile, int column) {
    const int lane = lane_index();
    return tile.lane_chunk(column + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  template <class Tile>
  static FAE_DEVICE LaneChunk b_columns(const Tile& tile) {
    return tile.lane_chunk(lane_index() % 16, lane_index() / 16);
  }

  template <class Tile>
  static FAE_DEVICE void load_a_rows(A& a, LaneChunk lane, int row, int depth, bool) {
    ldmatrix_x4(a.reg, Tile::move(lane, row, depth / 8).at());
  }
  template <class Tile>
  static FAE_DEVICE void load_a_columns(A& a, LaneChunk lane, int depth, int row, bool) {
    ldmatrix_x4_transposed(a.reg, Tile::move(lane, depth, row / 8).at());
  }
  // Two operands side by side: columns [column, column + 8) and the next 8.
  template <class Tile>
  static FAE_DEVICE void load_b_rows(B (&b)[2], LaneChunk lane, int column, int depth, bool) {
    uint32_t reg[4];
    ldmatrix_x4(reg, Tile::move(lane, column, depth / 8).at());
    set(b, reg);
  }
  template <class Tile>
  static FAE_DEVICE void load_b_columns(B (&b)[2], LaneChunk lane, int depth, int column, bool) {
    uint32_t reg[4];
    ldmatrix_x4_transposed(reg, Tile::move(lane, depth, column / 8).at());
    set(b, reg);
  }

  // Columns [kStep step, kStep (step + 1)) of an accumulator, rounded to T.
  template <int kN>
  static FAE_DEVICE void from_accumulator(A& a, const FragC (&c)[kN], int step, bool) {
    a.reg[0] = pack_pair(T{}, c[2 * step][0], c[2 * step][1]);
    a.reg[1] = pack_pair(T{}, c[2 * step][2], c[2 * step][3]);
    a.reg[2] = pack_pair(T{}, c[2 * step + 1][0], c[2 * step + 1][1]);
    a.reg[3] = pack_pair(T{}, c[2 * step + 1][2], c[2 * step + 1][3]);
  }

 private:
  static FAE_DEVICE void set(B (&b)[2], const uint32_t (&reg)[4]) {
    b[0].reg[0] = reg[0];
    b[0].reg[1] = reg[1];
    b[1].reg[0] = reg[2];
    b[1].reg[1] = reg[3];
  }
};

// fp32 by TF32: x = high + low, and high high + high low + low high is all but 2^-22 of the
// product. `fast`: high high alone.
template <>
struct Mma<float> {
  static constexpr int kStep = 8;
  template <int kRegs>
  struct Split {
    uint32_t high[kRegs], low[kRegs];

    // to_tf32 is half a dozen instructions on sm_80. The split needs no care for NaN: x - high is NaN
    // then, whatever high is, and so is every product with low, of which mma drops the last bits itself.
    FAE_DEVICE void set(const float (&x)[kRegs], bool fast) {
      if (fast) {
        FAE_UNROLL
        for (int i = 0; i < kRegs; ++i) high[i] = to_tf32(x[i]);
      } else {
        FAE_UNROLL
        for (int i = 0; i < kRegs; ++i) {
          high[i] = (bit_cast<uint32_t>(x[i]) + 0x1000u) & 0xffffe000u;
          low[i] = bit_cast<uint32_t>(x[i] - bit_cast<float>(high[i]));
        }
      }
    }
  };
  using A = Split<4>;
  using B = Split<2>;

  // kBFirst: the terms in the order of b a, so that a product and its transpose round alike.
  template <bool kBFirst = false>
  static FAE_DEVICE void multiply(FragC& d, const A& a, const B& b, bool fast) {
    if (!fast) {
      if constexpr (kBFirst) mma_m16n8k8_tf32(d, a.high, b.low);
      mma_m16n8k8_tf32(d, a.low, b.high);
      if constexpr (!kBFirst) mma_m16n8k8_tf32(d, a.high, b.low);
    }
    mma_m16n8k8_tf32(d, a.high, b.high);
  }

  template <class Tile>
  static FAE_DEVICE LaneChunk a_rows(const Tile& tile, int row) {
    return tile.lane_chunk(row + lane_index() % 16, lane_index() / 16);
  }
  template <class Tile>
  static FAE_DEVICE LaneChunk b_rows(const Tile& tile, int column) {
    const int lane = lane_index();
    return tile.lane_chunk(column + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  template <class Tile>
  static FAE_DEVICE LaneChunk b_columns(const Tile& tile) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    LaneChunk lane = tile.lane_chunk(2 * t, g / Tile::kChunk);
    lane.offset += g % Tile::kChunk * 4;
    return lane;
  }
  template <class Tile>
  static FAE_DEVICE LaneChunk a_columns(const Tile& tile, int row) {
    return Tile::move(b_columns(tile), 0, row / 4);
  }

  template <class Tile>
  static FAE_DEVICE void load_a_rows(A& a, LaneChunk lane, int row, int depth, bool fast) {
    uint32_t reg[4];
    ldmatrix_x4(reg, Tile::move(lane, row, depth / 4).at());
    float x[4];
    FAE_UNROLL
    for (int i = 0; i < 4; ++i) x[i] = bit_cast<float>(reg[i]);
    a.set(x, fast);
  }
  template <class Tile>
  static FAE_DEVICE void load_a_columns(A& a, LaneChunk lane, int depth, int row, bool fast) {
    float x[4];
    FAE_UNROLL
    for (int i = 0; i < 4; ++i) x[i] = load_column<Tile>(lane, depth, row + i % 2 * 8, i / 2);
    a.set(x, fast);
  }
  template <class Tile>
  static FAE_DEVICE void load_b_rows(B (&b)[2], LaneChunk lane, int column, int depth, bool fast) {
    uint32_t reg[4];
    ldmatrix_x4(reg, Tile::move(lane, column, depth / 4).at());
    b[0].set({bit_cast<float>(reg[0]), bit_cast<float>(reg[1])}, fast);
    b[1].set({bit_cast<float>(reg[2]), bit_cast<float>(reg[3])}, fast);
  }
  template <class Tile>
  static FAE_DEVICE void load_b_columns(B (&b)[2], LaneChunk lane, int depth, int column, bool fast) {
    FAE_UNROLL
    for (int i = 0; i < 2; ++i) {
      b[i].set({load_column<Tile>(lane, depth, column + i * 8, 0),
                load_column<Tile>(lane, depth, column + i * 8, 1)},
               fast);
    }
  }

  template <int kN>
  static FAE_DEVICE void from_accumulator(A& a, const FragC (&c)[kN], int step, bool fast) {
    a.set({c[step][0], c[step][2], c[step][1], c[step][3]}, fast);
  }

 private:
  // Element (2 t + odd, g) of the 8 x 8 block at (depth, column).
  template <class Tile>
  static FAE_DEVICE float load_column(LaneChunk lane, int depth, int column, int odd) {
    const LaneChunk from = Tile::move(lane, depth, column / 4);
    return load_shared((odd ? Tile::below(from) : from).at().template as<float>());
  }
};

}  // namespace fae::cuda
