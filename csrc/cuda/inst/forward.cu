// Forward kernels of one element type and head dim, given by the build as FAE_TYPE, FAE_DIM and FAE_SPLIT.
#include "cuda/launch/launch.h"
#include "cuda/sm80/forward.h"

namespace fae::cuda {
namespace {

template <bool kModified>
const AddVariant kForward{make_variant<sm80::Forward<FAE_TYPE, FAE_DIM, FAE_SPLIT, kModified>>(
    Pass::kForward, DTypeOf<FAE_TYPE>::value, FAE_DIM, FAE_SPLIT, kModified)};
template const AddVariant kForward<false>;
template const AddVariant kForward<true>;

}  // namespace
}  // namespace fae::cuda
