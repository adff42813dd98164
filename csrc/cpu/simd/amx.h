// Intel AMX: two tiles of bf16, 16 x 32 and 32 x 16, are multiplied by one instruction (tdpbf16ps).
//
// A tile is up to 16 rows of 64 bytes. Rows of A are 32 contraction elements; rows of B are pairs of
// contraction elements for 16 columns, which is how panels hold them. Everything but matrix products is done
// by AVX-512, as without tiles.
#pragma once

#include "cpu/simd/bf16_dot.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

struct AmxProduct : Bf16DotProduct {
  static constexpr int kTileRows = 32, kTileVecs = 4;
  static constexpr int kDepth = 32;
  static constexpr bool kTiles = true;

  // Tile registers are memory that the operating system saves: given back as soon as they are not needed.
  struct Session {
    FAE_INLINE Session() { configure(kTileRows); }
    FAE_INLINE ~Session() { _tile_release(); }
  };

  // args.depth: whole tiles. Exactly `rows` rows of A are read and of C written.
  template <Update kUpdate>
  static FAE_INLINE void multiply(int rows, int vecs, const TileArgs<AmxProduct>& args) {
    if (rows < kTileRows) configure(rows);
    // GCC's intrinsics do not tell it which memory a tile is loaded from.
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    if (rows > kSide) columns<kUpdate, true>(vecs, args);
    else columns<kUpdate, false>(vecs, args);
    __atomic_signal_fence(__ATOMIC_SEQ_CST);
    if (rows < kTileRows) configure(kTileRows);
  }

 private:
  static constexpr int kSide = 16;  // rows of a tile, and columns of C

  // Sums of up to 2 x 2 tiles are in registers 0 to 3; 4 and 5 hold A, 6 and 7 hold B.
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
  };
  struct Configs {
    Config of[kTileRows + 1];
    constexpr Configs() : of() {
      for (int n = 1; n <= kTileRows; ++n) {
        Config& c = of[n];
        const uint8_t upper = uint8_t(n < kSide ? n : kSide), lower = uint8_t(n - upper);
        c.rows[0] = c.rows[1] = c.rows[4] = upper;
        c.rows[2] = c.rows[3] = c.rows[5] = lower;
        c.rows[6] = c.rows[7] = kSide;
        if (lower == 0) c.row_bytes[2] = c.row_bytes[3] = c.row_bytes[5] = 0;
      }
    }
  };
  static FAE_INLINE void configure(int rows) {
    static constexpr Configs configs{};
    _tile_loadconfig(&configs.of[rows]);
  }

  template <Update kUpdate, bool kTwoRows>
  static FAE_INLINE void columns(int vecs, const TileArgs<AmxProduct>& args) {
    int j = 0;
    for (; j + 2 <= vecs; j += 2) tiles<kUpdate, kTwoRows, true>(j * kSide, args);
    if (j < vecs) tiles<kUpdate, kTwoRows, false>(j * kSide, args);
  }

  // Columns [column, column + 16), or twice as many, of C.
  template <Update kUpdate, bool kTwoRows, bool kTwoColumns>
  static FAE_INLINE void tiles(int column, const TileArgs<AmxProduct>& args) {
    const int64_t a_bytes = args.a_row * int64_t(sizeof(BFloat16)),
                  b_bytes = args.ldb * int64_t(sizeof(BFloat16)), c_bytes = args.ldc * int64_t(sizeof(float));
    float* const c = args.c + column;
    float* const lower_c = c + kSide * args.ldc;
    if constexpr (kUpdate == Update::kStore) {
      _tile_zero(0);
      if constexpr (kTwoColumns) _tile_zero(1);
      if constexpr (kTwoRows) _tile_zero(2);
      if constexpr (kTwoRows && kTwoColumns) _tile_zero(3);
    } else {
      _tile_loadd(0, c, c_bytes);
      if constexpr (kTwoColumns) _tile_loadd(1, c + kSide, c_bytes);
      if constexpr (kTwoRows) _tile_loadd(2, lower_c, c_bytes);
      if constexpr (kTwoRows && kTwoColumns) _tile_loadd(3, lower_c + kSide, c_bytes);
    }
    const BFloat16* a = args.a;
    const BFloat16* b = args.b + column * kPair;
    for (int64_t d = args.depth; d > 0; d -= kDepth / kPair) {
      _tile_loadd(6, b, b_bytes);
      _tile_loadd(4, a, a_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kTwoRows) {
        _tile_loadd(5, a + kSide * args.a_row, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (kTwoColumns) {
        _tile_loadd(7, b + kSide * kPair, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kTwoRows) _tile_dpbf16ps(3, 5, 7);
      }
      a += kDepth;
      b += kDepth / kPair * args.ldb;
    }
    _tile_stored(0, c, c_bytes);
    if constexpr (kTwoColumns) _tile_stored(1, c + kSide, c_bytes);
    if constexpr (kTwoRows) _tile_stored(2, lower_c, c_bytes);
    if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, lower_c + kSide, c_bytes);
  }
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
