// Descriptions of tensors for the validators, without data.
#pragma once

#include <string>
#include <vector>

#include "core/describe.h"

namespace fae::testing {

inline TensorDesc described(const std::vector<int64_t>& shape, DType dtype = DType::kFloat32) {
  TensorDesc d;
  d.present = true;
  d.dtype = dtype;
  d.rank = int(shape.size());
  int64_t step = 1;
  for (int i = d.rank; i-- > 0;) {
    d.shape[i] = shape[size_t(i)];
    d.stride[i] = step;
    step *= shape[size_t(i)];
  }
  return d;
}

}  // namespace fae::testing
