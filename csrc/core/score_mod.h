// What happens to one score between the dot product and the softmax.
#pragma once

#include <cmath>

#include "core/dtype.h"
#include "core/tensor_view.h"

namespace fae {

// One number per (batch, query head), of any floating dtype.
struct PerHead {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride[2] = {0, 0};  // of batch and head

  FAE_HD bool present() const { return data != nullptr; }
  FAE_HD double at(int64_t b, int64_t head_q) const {
    return load_as_double(data, dtype, b * stride[0] + head_q * stride[1]);
  }
};

// score = softcap(scale * dot) + bias - slope * |i + seq_kv - seq_q - j|; a bias of -inf hides the key.
// A sink is one more score per head, of a key without a value: it takes probability and gives nothing.
struct ScoreMod {
  double scale = 1.0;
  double softcap = 0.0;  // 0: none; else softcap * tanh(score / softcap)
  View4 bias;            // (batch, head_q, query, key), additive
  DType bias_dtype = DType::kFloat32;
  PerHead alibi;  // slopes
  PerHead sinks;

  // True when the score is scale * dot with scale > 0, so that a row's largest
  // dot product also has the largest score and scaling folds into the exponent.
  FAE_HD bool is_plain() const {
    return softcap == 0.0 && !bias.present() && !alibi.present() && scale > 0.0;
  }
};

template <class Real>
FAE_HD inline Real softcap_score(Real score, Real softcap) {
  return softcap * std::tanh(score / softcap);
}

// d softcap(s) / d s, from the capped value.
template <class Real>
FAE_HD inline Real softcap_slope(Real capped, Real softcap) {
  const Real t = capped / softcap;
  return Real(1) - t * t;
}

}  // namespace fae
