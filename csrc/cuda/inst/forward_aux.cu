// The forward pass's kernels for every head dim, of one element type, given by the build as FAE_TYPE.
#include "cuda/fwd_aux/merge_partials.h"
#include "cuda/launch/launch.h"

namespace fae::cuda {
namespace {

template <bool kModified>
const AddVariant kMergePartials(make_variant<MergePartials<FAE_TYPE, kModified>>(Pass::kMergePartials,
                                                                                 DTypeOf<FAE_TYPE>::value, 0,
                                                                                 true, kModified));
template const AddVariant kMergePartials<false>;
template const AddVariant kMergePartials<true>;

}  // namespace
}  // namespace fae::cuda
