// The backward pass's kernels for every head dim, of one element type, given by the build as FAE_TYPE.
#include "cuda/bwd_aux/head_grad.h"
#include "cuda/bwd_aux/round_query_grad.h"
#include "cuda/bwd_aux/row_stats.h"
#include "cuda/launch/launch.h"
#include "cuda/sm80/bias_grad.h"

namespace fae::cuda {
namespace {

constexpr DType kType = DTypeOf<FAE_TYPE>::value;

const AddVariant kStatsPlain(make_variant<RowStatsKernel<FAE_TYPE, false>>(Pass::kRowStats, kType, 0, true,
                                                                           false));
const AddVariant kStatsModified(make_variant<RowStatsKernel<FAE_TYPE, true>>(Pass::kRowStats, kType, 0, true,
                                                                             true));
const AddVariant kRoundPlain(make_variant<RoundQueryGrad<FAE_TYPE, false>>(Pass::kRoundQueryGrad, kType, 0,
                                                                           true, false));
const AddVariant kRoundModified(make_variant<RoundQueryGrad<FAE_TYPE, true>>(Pass::kRoundQueryGrad, kType, 0,
                                                                             true, true));
const AddVariant kBiasGrad(make_variant<sm80::BiasGrad<FAE_TYPE, 64>>(Pass::kBiasGrad, kType, 64, true,
                                                                      true));
const AddVariant kHeadGrad(make_variant<HeadGrad<FAE_TYPE>>(Pass::kHeadGrad, kType, 0, true, true));

}  // namespace
}  // namespace fae::cuda
