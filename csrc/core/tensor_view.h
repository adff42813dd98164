// A strided view that every layout and every broadcast shape reduces to.
#pragma once

#include <cstdint>

#include "core/hd.h"

namespace fae {

// Four axes in one fixed order: (batch, head, row, column). A row is a query or
// a key; a column is a head-dim element, or a key for masks and biases. Strides
// count elements; a broadcast axis has stride 0. No view is ever negative-strided.
struct View4 {
  void* data = nullptr;
  int64_t stride[4] = {0, 0, 0, 0};

  FAE_HD bool present() const { return data != nullptr; }
  FAE_HD int64_t offset(int64_t b, int64_t h, int64_t row) const {
    return b * stride[0] + h * stride[1] + row * stride[2];
  }
};

}  // namespace fae
