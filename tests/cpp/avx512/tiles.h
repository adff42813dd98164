// AMX's tile registers in memory, by Intel's manual: what is not configured is an error, and rows and bytes
// past a tile's own are neither read nor written.
#pragma once

namespace fae_amx {

struct State {
  uint8_t rows[8] = {};
  uint16_t row_bytes[8] = {};
  alignas(64) uint8_t tile[8][16][64] = {};
  bool configured = false;
};
inline State& state() {
  static thread_local State one;
  return one;
}
inline void require(bool holds) {
  if (!holds) __builtin_trap();  // an invalid instruction, as on the processor
}
inline State& usable(int tile) {
  State& s = state();
  require(s.configured && s.rows[tile] > 0 && s.row_bytes[tile] > 0);
  return s;
}

inline void configure(const void* config) {
  const uint8_t* const bytes = static_cast<const uint8_t*>(config);
  State& s = state();
  s = State();
  require(bytes[0] == 1 && bytes[1] == 0);
  for (int i = 2; i < 16; ++i) require(bytes[i] == 0);
  for (int t = 0; t < 8; ++t) {
    memcpy(&s.row_bytes[t], bytes + 16 + 2 * t, 2);
    s.rows[t] = bytes[48 + t];
    require(s.rows[t] <= 16 && s.row_bytes[t] <= 64 && (s.rows[t] == 0) == (s.row_bytes[t] == 0));
  }
  s.configured = true;
}
inline void release() { state() = State(); }
inline void zero(int tile) {
  State& s = usable(tile);
  memset(s.tile[tile], 0, sizeof(s.tile[tile]));
}
inline void load(int tile, const void* base, int64_t stride) {
  zero(tile);
  State& s = usable(tile);
  for (int r = 0; r < s.rows[tile]; ++r)
    memcpy(s.tile[tile][r], static_cast<const uint8_t*>(base) + r * stride, s.row_bytes[tile]);
}
inline void store(int tile, void* base, int64_t stride) {
  const State& s = usable(tile);
  for (int r = 0; r < s.rows[tile]; ++r)
    memcpy(static_cast<uint8_t*>(base) + r * stride, s.tile[tile][r], s.row_bytes[tile]);
}
// c += a b: sums of even and of odd products of a row, which then come together.
inline void multiply(int c, int a, int b) {
  State& s = usable(c);
  usable(a);
  usable(b);
  require(s.rows[c] == s.rows[a] && s.row_bytes[c] == s.row_bytes[b] && s.row_bytes[a] == 4 * s.rows[b]);
  const auto factor = [&s](int tile, int row, int i) {
    uint16_t half;
    memcpy(&half, s.tile[tile][row] + 2 * i, 2);
    const uint32_t bits = uint32_t(half) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
  };
  for (int m = 0; m < s.rows[c]; ++m) {
    for (int n = 0; n < s.row_bytes[c] / 4; ++n) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < s.rows[b]; ++k) {
        even = __builtin_fmaf(factor(a, m, 2 * k), factor(b, k, 2 * n), even);
        odd = __builtin_fmaf(factor(a, m, 2 * k + 1), factor(b, k, 2 * n + 1), odd);
      }
      memcpy(&sum, s.tile[c][m] + 4 * n, 4);
      sum += even + odd;
      memcpy(s.tile[c][m] + 4 * n, &sum, 4);
    }
  }
}

}  // namespace fae_amx

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) fae_amx::configure(config)
#define _tile_release() fae_amx::release()
#define _tile_zero(tile) fae_amx::zero(tile)
#define _tile_loadd(tile, base, stride) fae_amx::load(tile, base, stride)
#define _tile_stored(tile, base, stride) fae_amx::store(tile, base, stride)
#define _tile_dpbf16ps(c, a, b) fae_amx::multiply(c, a, b)
