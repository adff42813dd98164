// What happens to one score between the dot product and the softmax.
#pragma once

#include <cmath>

#include "core/dtype.h"
#include "core/tensor_view.h"

namespace fae {

// score = softcap(scale * dot) + bias; a bias of -inf hides the key.
struct ScoreMod {
  double scale = 1.0;
  double softcap = 0.0;  // 0: none; else softcap * tanh(score / softcap)
  View4 bias;            // (batch, head_q, query, key), additive
  DType bias_dtype = DType::kFloat32;

  // True when the score is scale * dot with scale > 0, so that a row's largest
  // dot product also has the largest score and scaling folds into the exponent.
  FAE_HD bool is_plain() const { return softcap == 0.0 && !bias.present() && scale > 0.0; }
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
