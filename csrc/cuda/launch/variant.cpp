#include "cuda/launch/variant.h"

namespace fae::cuda {
namespace {

// Made by the first file that adds to it, in whatever order files are loaded.
std::vector<Variant>& table() {
  static std::vector<Variant> variants;
  return variants;
}

}  // namespace

const char* name_of(Pass pass) {
  switch (pass) {
    case Pass::kForward: return "forward";
    case Pass::kMergePartials: return "merge_partials";
    case Pass::kRowStats: return "row_stats";
    case Pass::kKeyGrad: return "key_grad";
    case Pass::kQueryGrad: return "query_grad";
    case Pass::kRoundQueryGrad: return "round_query_grad";
    case Pass::kBiasGrad: return "bias_grad";
    default: return "head_grad";
  }
}

const std::vector<Variant>& variants() { return table(); }

AddVariant::AddVariant(const Variant& variant) { table().push_back(variant); }

}  // namespace fae::cuda
