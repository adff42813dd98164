#include "cuda/launch/c_api.h"

#include <cstring>
#include <string>

#include "cuda/api.h"

namespace fae::cuda {
namespace {

// Any address: whether there is a bias, or sinks and such, matters, not where.
char somewhere[1];
const int64_t no_state = 0;

Problem problem_of(const FaeCudaQuery& query) {
  Problem p;
  p.dtype = static_cast<DType>(query.dtype);
  p.batch = query.batch;
  p.heads_q = query.heads_q;
  p.heads_kv = query.heads_kv;
  p.seq_q = query.seq_q;
  p.seq_kv = query.seq_kv;
  p.dim = query.dim;
  p.dim_v = query.dim_v;
  p.score.scale = query.scale;
  p.score.softcap = query.softcap;
  if (query.biased) p.score.bias.data = somewhere;
  if (query.with_slopes) p.score.alibi.data = somewhere;
  if (query.with_dropout) p.dropout.state = &no_state;
  if (query.with_sinks) p.score.sinks.data = somewhere;
  return p;
}

// Texts here hold neither quotes nor backslashes of their own but for kernel names in 'single' ones.
std::string quoted(const std::string& text) { return "\"" + text + "\""; }

std::string number(const char* name, int64_t value) { return quoted(name) + ": " + std::to_string(value); }

std::string fields_of(const Variant& v) {
  return quoted("kernel") + ": " + quoted(v.name) + ", " + quoted("pass") + ": " + quoted(name_of(v.pass)) +
         ", " + quoted("dtype") + ": " + quoted(name_of(v.dtype)) + ", " + number("dim", v.dim) + ", " +
         quoted("split") + ": " + (v.split ? "true" : "false") + ", " + quoted("modified") + ": " +
         (v.modified ? "true" : "false") + ", " + number("tile_q", v.tile_q) + ", " +
         number("tile_kv", v.tile_kv) + ", " + number("threads", v.threads) + ", " +
         number("shared_bytes", v.shared_bytes);
}

std::string text_of(const Plan& plan) {
  std::string objections, launches;
  for (const std::string& objection : plan.objections) {
    objections += (objections.empty() ? "" : ", ") + quoted(objection);
  }
  for (const Launch* launch : {&plan.forward, &plan.merge_partials, &plan.row_stats, &plan.key_grad,
                               &plan.query_grad, &plan.round_query_grad, &plan.bias_grad, &plan.head_grad}) {
    if (!launch->variant) continue;
    launches += (launches.empty() ? "{" : ", {") + fields_of(*launch->variant) + ", " +
                number("blocks", launch->blocks) + "}";
  }
  return "{" + quoted("objections") + ": [" + objections + "], " + quoted("launches") + ": [" + launches +
         "], " + number("num_splits", plan.num_splits) + ", " +
         number("workspace_bytes", int64_t(plan.workspace_bytes)) + "}";
}

int64_t hand_out(const std::string& from, char* text, int64_t size) {
  if (int64_t(from.size()) < size) std::memcpy(text, from.c_str(), from.size() + 1);
  return int64_t(from.size());
}

}  // namespace
}  // namespace fae::cuda

int64_t fae_cuda_plan(const FaeCudaQuery* query, char* text, int64_t size) {
  using namespace fae::cuda;
  const fae::Problem problem = problem_of(*query);
  const Device device{query->compute_capability, query->shared_bytes, query->l2_bytes,
                      query->multiprocessors};
  const Options options{query->deterministic != 0, query->fast_fp32 != 0, query->num_splits,
                        query->batch_invariant != 0};
  const MoreGradients more{query->need_bias_grad ? query->dbias_shape : nullptr, query->need_sink_grad != 0,
                           query->need_slope_grad != 0};
  return hand_out(text_of(query->backward ? plan_backward(problem, device, options, more)
                                          : plan_forward(problem, device, options)),
                  text, size);
}

int64_t fae_cuda_variants(char* text, int64_t size) {
  using namespace fae::cuda;
  std::string rows;
  for (const Variant& v : variants()) rows += (rows.empty() ? "{" : ", {") + fields_of(v) + "}";
  return hand_out("[" + rows + "]", text, size);
}
