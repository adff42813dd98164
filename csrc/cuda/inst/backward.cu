// Gradient kernels of one element type and head dim, given by the build as FAE_TYPE, FAE_DIM and FAE_SPLIT.
#include "cuda/launch/launch.h"
#include "cuda/sm80/key_grad.h"
#include "cuda/sm80/query_grad.h"

namespace fae::cuda {
namespace {

constexpr DType kType = DTypeOf<FAE_TYPE>::value;

template <bool kModified>
const AddVariant kKeyGrad{make_variant<sm80::KeyGrad<FAE_TYPE, FAE_DIM, FAE_SPLIT, kModified>>(
    Pass::kKeyGrad, kType, FAE_DIM, FAE_SPLIT, kModified)};
template const AddVariant kKeyGrad<false>;
template const AddVariant kKeyGrad<true>;

template <bool kModified>
const AddVariant kQueryGrad{make_variant<sm80::QueryGrad<FAE_TYPE, FAE_DIM, FAE_SPLIT, kModified>>(
    Pass::kQueryGrad, kType, FAE_DIM, FAE_SPLIT, kModified)};
template const AddVariant kQueryGrad<false>;
template const AddVariant kQueryGrad<true>;

}  // namespace
}  // namespace fae::cuda
