// Tensors of the stable ABI as the core sees them, and back.
#pragma once

#include "core/describe.h"
#include "torch/boxed.h"

namespace fae::torch_ops {

enum class Access : uint8_t { kRead, kWrite };

// Shape, strides, dtype, device and data of a tensor; `present` is false for none.
// `name` is the argument's, for a shape that cannot be held.
TensorDesc describe(const char* name, const TensorRef& tensor, Access access = Access::kRead);

// A device, in libtorch's numbers.
struct Place {
  int32_t type;
  int32_t index;
};
Place place_of(const TensorRef& tensor);

// A new tensor, uninitialised. `desc` describes it as describe() would.
struct NewTensor {
  TensorRef tensor;
  TensorDesc desc;
};
// Contiguous; or, with the strides of `like` (as many axes), dense with its axes in the same order in memory.
NewTensor new_tensor(DType dtype, int rank, const int64_t* shape, Place place,
                     const TensorDesc* like = nullptr);

void fill_with_zeros(const NewTensor& tensor);

// The tensor itself if it is contiguous, else a contiguous copy.
NewTensor contiguous(TensorRef tensor, const TensorDesc& desc);

// Gathers the shape of an LSE: (batch, heads, seq) without the axes that q lacks.
// Returns its rank.
int lse_shape(const TensorDesc& q, Layout layout, int64_t shape[3]);

}  // namespace fae::torch_ops
