// What every primitive does with given inputs: one kernel per primitive, written against
// cuda/prim, so that a card and the emulator run the same source.
//
// A case takes kIn words per lane and gives kOut words per lane, in kRounds blocks of one
// warp. Its inputs follow from integers alone. Matrix products are of integers so small
// that every partial sum is exact: in which order and how wide hardware adds does not show.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/prim/convert.h"
#include "cuda/prim/cp_async.h"
#include "cuda/prim/global.h"
#include "cuda/prim/ldmatrix.h"
#include "cuda/prim/math.h"
#include "cuda/prim/mma_sm80.h"
#include "cuda/prim/warp.h"

namespace fae::cuda::conformance {

// A well mixed word for (round, lane, i). Host.
inline uint32_t mixed(int round, int lane, int i) {
  uint32_t x = uint32_t(round) * 0x9e3779b9u + uint32_t(lane) * 0x85ebca6bu + uint32_t(i) * 0xc2b2ae35u + 1;
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

inline float small_integer(uint32_t word) { return float(int(word % 33) - 16); }

// Floats of all magnitudes, halfway cases of every narrower type, and the ends of the range;
// no NaN, whose bits say nothing.
inline uint32_t any_float(int round, int lane, int i) {
  constexpr uint32_t kCorners[] = {
      0x00000000u, 0x80000000u, 0x3f800000u, 0xbf800000u, 0x7f800000u, 0xff800000u, 0x7f7fffffu, 0x00000001u,
      0x007fffffu, 0x00800000u, 0x477fe000u, 0x477fefffu, 0x477ff000u, 0x33000000u, 0x33000001u, 0x387fc000u,
      0x38800000u, 0x3f801000u, 0x3f803000u, 0x3f808000u, 0x3f818000u, 0x3f800fffu, 0x3f801001u, 0x7f7f8000u,
      0x7f7f7fffu, 0x7f7ff000u, 0x7f7fefffu, 0x00001000u, 0x00000fffu, 0x3effffffu, 0x40490fdbu, 0xc2f6e979u};
  if (round == 0 && i % 2 == 0) return kCorners[lane];
  const uint32_t x = mixed(round, lane, i);
  // fp16's exponents half of the time.
  const uint32_t exponent = lane % 2 ? x >> 23 & 255 : 100 + (x >> 23) % 45;
  return (x & 0x807fffffu) | (exponent == 255 ? 254u : exponent) << 23;
}

struct LdmatrixX4 {
  static constexpr const char* kName = "ldmatrix_x4";
  static constexpr int kIn = 4, kOut = 4;
  static uint32_t input(int round, int lane, int i) { return mixed(round, lane, i); }
  static FAE_DEVICE void run(const uint32_t (&in)[4], uint32_t (&out)[4]) {
    // Rows lie in a mixed order.
    const Smem<std::byte> row = shared_memory() + lane_index() * 5 % 32 * 16;
    store_shared(row.as<Vec16>(), Vec16{{in[0], in[1], in[2], in[3]}});
    block_barrier();
    ldmatrix_x4(out, row);
  }
};

struct LdmatrixX4Transposed : LdmatrixX4 {
  static constexpr const char* kName = "ldmatrix_x4_transposed";
  static FAE_DEVICE void run(const uint32_t (&in)[4], uint32_t (&out)[4]) {
    const Smem<std::byte> row = shared_memory() + lane_index() * 5 % 32 * 16;
    store_shared(row.as<Vec16>(), Vec16{{in[0], in[1], in[2], in[3]}});
    block_barrier();
    ldmatrix_x4_transposed(out, row);
  }
};

// A in words 0 to 3, B in 4 and 5, the accumulator in 6 to 9.
template <class T>
struct MmaPairs {
  static constexpr const char* kName =
      DTypeOf<T>::value == DType::kFloat16 ? "mma_m16n8k16_f16" : "mma_m16n8k16_bf16";
  static constexpr int kIn = 10, kOut = 4;
  static uint32_t input(int round, int lane, int i) {
    const uint32_t x = mixed(round, lane, i);
    if (i >= 6) return bit_cast<uint32_t>(small_integer(x));
    const auto bits = [](float y) {
      if constexpr (DTypeOf<T>::value == DType::kFloat16) return to_float16(y).bits;
      else return to_bfloat16(y).bits;
    };
    return uint32_t(bits(small_integer(x & 0xffffu))) | uint32_t(bits(small_integer(x >> 16))) << 16;
  }
  static FAE_DEVICE void run(const uint32_t (&in)[10], uint32_t (&out)[4]) {
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]}, b[2] = {in[4], in[5]};
    float d[4];
    memcpy(d, in + 6, 16);
    if constexpr (DTypeOf<T>::value == DType::kFloat16) mma_m16n8k16_f16(d, a, b);
    else mma_m16n8k16_bf16(d, a, b);
    memcpy(out, d, 16);
  }
};

struct MmaTf32 {
  static constexpr const char* kName = "mma_m16n8k8_tf32";
  static constexpr int kIn = 10, kOut = 4;
  static uint32_t input(int round, int lane, int i) {
    return bit_cast<uint32_t>(small_integer(mixed(round, lane, i)));
  }
  static FAE_DEVICE void run(const uint32_t (&in)[10], uint32_t (&out)[4]) {
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]}, b[2] = {in[4], in[5]};
    float d[4];
    memcpy(d, in + 6, 16);
    mma_m16n8k8_tf32(d, a, b);
    memcpy(out, d, 16);
  }
};

// Whether the 13 bits that TF32 has no room for are without effect.
struct MmaTf32LowBits : MmaTf32 {
  static constexpr const char* kName = "mma_m16n8k8_tf32_low_bits";
  static uint32_t input(int round, int lane, int i) {
    const uint32_t x = MmaTf32::input(round, lane, i);
    return i >= 6 ? x : x | (mixed(round, lane, i) >> 7 & 0x1fffu);
  }
};

template <class T>
struct PackPair {
  static constexpr const char* kName =
      DTypeOf<T>::value == DType::kFloat16 ? "pack_pair_f16" : "pack_pair_bf16";
  static constexpr int kIn = 2, kOut = 1;
  static uint32_t input(int round, int lane, int i) { return any_float(round, lane, i); }
  static FAE_DEVICE void run(const uint32_t (&in)[2], uint32_t (&out)[1]) {
    out[0] = pack_pair(T{}, bit_cast<float>(in[0]), bit_cast<float>(in[1]));
  }
};

// Of all classes but NaN: zero, subnormals, infinities (in round 0 every exponent of fp16).
template <class T>
struct Widen {
  static constexpr bool kHalf = DTypeOf<T>::value == DType::kFloat16;
  static constexpr const char* kName = kHalf ? "widen_f16" : "widen_bf16";
  static constexpr int kIn = 1, kOut = 1;
  static uint32_t input(int round, int lane, int i) {
    const uint32_t exponent = kHalf ? 0x7c00u : 0x7f80u, x = mixed(round, lane, i) & 0xffffu;
    if (round == 0) return lane % 2 ? uint32_t(lane) << 10 : (x & 0x83ffu) | uint32_t(lane) << 10;
    return (x & exponent) == exponent ? x & (0x8000u | exponent) : x;
  }
  static FAE_DEVICE void run(const uint32_t (&in)[1], uint32_t (&out)[1]) {
    out[0] = bit_cast<uint32_t>(widen(T{uint16_t(in[0])}));
  }
};

struct ToTf32 {
  static constexpr const char* kName = "to_tf32";
  static constexpr int kIn = 1, kOut = 1;
  static uint32_t input(int round, int lane, int i) { return any_float(round, lane, i); }
  static FAE_DEVICE void run(const uint32_t (&in)[1], uint32_t (&out)[1]) {
    out[0] = to_tf32(bit_cast<float>(in[0]));
  }
};

struct ShuffleXor {
  static constexpr const char* kName = "shuffle_xor";
  static constexpr int kIn = 2, kOut = 4;
  static uint32_t input(int round, int lane, int i) { return any_float(round, lane, i); }
  static FAE_DEVICE void run(const uint32_t (&in)[2], uint32_t (&out)[4]) {
    double wide;
    memcpy(&wide, in, 8);
    out[0] = bit_cast<uint32_t>(shuffle_xor(bit_cast<float>(in[0]), 1));
    out[1] = bit_cast<uint32_t>(shuffle_xor(bit_cast<float>(in[1]), 21));
    wide = shuffle_xor(wide, 16);
    memcpy(out + 2, &wide, 8);
  }
};

struct Shuffle {
  static constexpr const char* kName = "shuffle";
  static constexpr int kIn = 1, kOut = 2;
  static uint32_t input(int round, int lane, int i) { return any_float(round, lane, i); }
  static FAE_DEVICE void run(const uint32_t (&in)[1], uint32_t (&out)[2]) {
    out[0] = bit_cast<uint32_t>(shuffle(bit_cast<float>(in[0]), 7));
    out[1] = bit_cast<uint32_t>(shuffle(bit_cast<float>(in[0]), lane_index() / 4 * 4));
  }
};

struct Votes {
  static constexpr const char* kName = "warp_ballot_and_block_any";
  static constexpr int kIn = 1, kOut = 3;
  static uint32_t input(int round, int lane, int i) { return mixed(round, lane, i); }
  static FAE_DEVICE void run(const uint32_t (&in)[1], uint32_t (&out)[3]) {
    out[0] = warp_ballot(in[0] % 3 == 0);
    out[1] = block_any(in[0] % 29 == 0);
    out[2] = block_any(false);
  }
};

// Odd words of a round are not valid and give zeros.
struct CopyAsync {
  static constexpr const char* kName = "copy_async_16";
  static constexpr int kIn = 1, kOut = 4;
  static uint32_t input(int round, int lane, int i) { return mixed(round, lane, i); }
  static FAE_DEVICE void run_from(const uint32_t* in, uint32_t (&out)[4]) {
    const int lane = lane_index();
    const Smem<std::byte> place = shared_memory() + (31 - lane) * 16;
    copy_async_16(place, in + lane / 4 * 4, lane % 2 == 0);
    copy_async_commit();
    copy_async_wait<0>();
    block_barrier();
    const Vec16 copied = load_shared(place.as<Vec16>());
    memcpy(out, &copied, 16);
  }
};

struct Exp2Fast {
  static constexpr const char* kName = "exp2_fast";
  static constexpr int kIn = 1, kOut = 1;
  static uint32_t input(int round, int lane, int i) {
    if (round == 0) return bit_cast<uint32_t>(float(lane * 10 - 180));
    return bit_cast<uint32_t>(float(int(mixed(round, lane, i) % 280000u) - 150000) * 0.001f);
  }
  static FAE_DEVICE void run(const uint32_t (&in)[1], uint32_t (&out)[1]) {
    out[0] = bit_cast<uint32_t>(exp2_fast(bit_cast<float>(in[0])));
  }
};

constexpr int kRounds = 4;
constexpr int kSharedBytes = 32 * 16;

// Arrays of kRounds x 32 x words.
template <class Case>
FAE_DEVICE void run_case(const uint32_t* in, uint32_t* out) {
  const int64_t at = block_index() * kWarpSize + lane_index();
  uint32_t result[Case::kOut];
  if constexpr (requires { &Case::run_from; }) {
    Case::run_from(in + block_index() * kWarpSize * Case::kIn, result);
  } else {
    uint32_t words[Case::kIn];
    for (int i = 0; i < Case::kIn; ++i) words[i] = load_global(in + at * Case::kIn + i);
    Case::run(words, result);
  }
  for (int i = 0; i < Case::kOut; ++i) store_global(out + at * Case::kOut + i, result[i]);
}

}  // namespace fae::cuda::conformance
