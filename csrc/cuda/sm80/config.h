// Tile sizes of the sm_80 kernels: one row per compiled variant.
//
// What bounds them: 255 registers a thread hold a warp's accumulators; 99 KiB of shared
// memory is what the smallest cards since sm_80 give a block (163 KiB on sm_80 itself).
#pragma once

#include "core/dtype.h"

namespace fae::cuda::sm80 {

// Forward: kTileQ packed query rows against kTileKV keys at a time. kSplit: head dims
// beyond the largest bucket, kDim columns at a time; Q then streams with K. kM: kModified.
template <int kTileQ_, int kTileKV_, int kWarps_, int kSlots_>
struct ForwardTile {
  static constexpr int kTileQ = kTileQ_;
  static constexpr int kTileKV = kTileKV_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kSlots = kSlots_;
};

template <class T, int kDim, bool kSplit, bool kModified> struct ForwardConfig;  // 16-bit types by default
template <class T, bool kM> struct ForwardConfig<T, 64, false, kM> : ForwardTile<128, 64, 4, 4> {};
template <class T, bool kM> struct ForwardConfig<T, 96, false, kM> : ForwardTile<128, 32, 4, 4> {};
template <class T, bool kM> struct ForwardConfig<T, 128, false, kM> : ForwardTile<128, 32, 4, 4> {};
template <class T, bool kM> struct ForwardConfig<T, 256, false, kM> : ForwardTile<128, 32, 8, 2> {};
template <class T> struct ForwardConfig<T, 128, true, false> : ForwardTile<128, 32, 4, 2> {};
template <class T> struct ForwardConfig<T, 128, true, true> : ForwardTile<64, 32, 4, 2> {};
template <bool kM> struct ForwardConfig<float, 64, false, kM> : ForwardTile<64, 64, 4, 3> {};
template <bool kM> struct ForwardConfig<float, 128, false, kM> : ForwardTile<64, 32, 4, 3> {};
template <bool kM> struct ForwardConfig<float, 64, true, kM> : ForwardTile<64, 64, 4, 2> {};

// Gradients of keys and values: a block keeps kTileKV keys, 16 a warp, and goes over packed
// query rows kTileQ at a time. Their sums fill the registers.
template <int kTileQ_, int kWarps_>
struct KeyGradTile {
  static constexpr int kTileQ = kTileQ_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kTileKV = 16 * kWarps_;
};

template <class T, int kDim, bool kSplit, bool kModified> struct KeyGradConfig : KeyGradTile<32, 8> {};
template <class T> struct KeyGradConfig<T, 64, false, false> : KeyGradTile<64, 8> {};
template <class T, bool kModified> struct KeyGradConfig<T, 64, true, kModified> : KeyGradTile<64, 8> {};
template <int kDim, bool kSplit, bool kModified>
struct KeyGradConfig<float, kDim, kSplit, kModified> : KeyGradTile<32, 4> {};
template <> struct KeyGradConfig<float, 64, false, false> : KeyGradTile<32, 4> {};
template <bool kModified> struct KeyGradConfig<float, 64, true, kModified> : KeyGradTile<32, 4> {};

// Gradients of queries without atomics: 16 packed query rows a warp, kTileKV keys at a time.
template <int kTileKV_>
struct QueryGradTile {
  static constexpr int kWarps = 4;
  static constexpr int kTileQ = 16 * kWarps;
  static constexpr int kTileKV = kTileKV_;
};

template <class T, int kDim, bool kSplit> struct QueryGradConfig : QueryGradTile<64> {};
template <int kDim, bool kSplit> struct QueryGradConfig<float, kDim, kSplit> : QueryGradTile<32> {};

}  // namespace fae::cuda::sm80
