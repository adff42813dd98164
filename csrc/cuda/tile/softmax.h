// Online softmax over the accumulators of one warp (Milakov & Gimelshein 2018).
#pragma once

#include "cuda/prim/math.h"
#include "cuda/prim/warp.h"
#include "cuda/tile/score.h"

namespace fae::cuda {

// The four threads of a quad hold a row's columns.
FAE_DEVICE float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
FAE_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

FAE_DEVICE float warp_max(float x) {
  FAE_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}
FAE_DEVICE float warp_sum(float x) {
  FAE_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// The log-sum-exp of a row of element type T, from the maximum of its scores as kernels hold them and its
// sum.
template <class T>
FAE_DEVICE double row_lse(float max, float sum, const ScoreScale& scale) {
  if (sum == 0) return double(kHidden);
  const double largest = double(max) * double(scale.natural);
  if constexpr (lse_dtype(DTypeOf<T>::value) == DType::kFloat64) return largest + log(double(sum));
  else return largest + double(logf(sum));
}

// State of the rows lane / 4 + 8 half + 16 m of a warp.
template <int kM>
struct OnlineSoftmax {
  float max[kM][2];  // of score values, the same in all threads of a quad
  float sum[kM][2];  // of this thread's columns; see finish()

  FAE_DEVICE OnlineSoftmax() {
    FAE_UNROLL
    for (int m = 0; m < kM; ++m) {
      max[m][0] = max[m][1] = kHidden;
      sum[m][0] = sum[m][1] = 0;
    }
  }

  // A sink of these rows: there before any key, and without a value.
  FAE_DEVICE void begin_with(float sink, int m, int half) {
    max[m][half] = sink;
    // Of the quad, whose sums are added up in the end, one thread has it.
    sum[m][half] = sink != kHidden && lane_index() % 4 == 0 ? 1.0f : 0.0f;
  }

  // Scores become exp(score - max); what was accumulated under the old maximum is rescaled.
  template <int kN, int kO>
  FAE_DEVICE void update(FragC (&s)[kM][kN], FragC (&out)[kM][kO], float exponent) {
    FAE_UNROLL
    for (int m = 0; m < kM; ++m) {
      float alpha[2];
      FAE_UNROLL
      for (int half = 0; half < 2; ++half) alpha[half] = update_row(s[m], m, half, exponent);
      // Maxima settle early; after that there is nothing to rescale.
      if (warp_ballot(alpha[0] != 1.0f || alpha[1] != 1.0f) == 0) continue;
      FAE_UNROLL
      for (int n = 0; n < kO; ++n) {
        FAE_UNROLL
        for (int e = 0; e < 4; ++e) out[m][n][e] *= alpha[e / 2];
      }
    }
  }

  FAE_DEVICE void finish() {
    FAE_UNROLL
    for (int m = 0; m < kM; ++m) {
      FAE_UNROLL
      for (int half = 0; half < 2; ++half) sum[m][half] = quad_sum(sum[m][half]);
    }
  }

 private:
  // Returns the factor of what was accumulated before.
  template <int kN>
  FAE_DEVICE float update_row(FragC (&s)[kN], int m, int half, float exponent) {
    float tile_max = kHidden;
    FAE_UNROLL
    for (int n = 0; n < kN; ++n) tile_max = fmaxf(tile_max, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    const float new_max = fmaxf(max[m][half], quad_max(tile_max));
    // A row that has seen nothing yet: subtracting -inf would make NaN of its -inf scores.
    const float shift = new_max == kHidden ? 0.0f : new_max;
    const float alpha = exp2_fast((max[m][half] - shift) * exponent);
    float total = 0;
    FAE_UNROLL
    for (int n = 0; n < kN; ++n) {
      FAE_UNROLL
      for (int e = 2 * half; e < 2 * half + 2; ++e) {
        // The difference first: scaling both sides would round large scores apart.
        s[n][e] = exp2_fast((s[n][e] - shift) * exponent);
        total += s[n][e];
      }
    }
    sum[m][half] = sum[m][half] * alpha + total;
    max[m][half] = new_max;
    return alpha;
  }
};

}  // namespace fae::cuda
