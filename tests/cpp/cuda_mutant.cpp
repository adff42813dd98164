// A few kernels and the problems that show whether they are right: compiled by
// tests/test_cuda_mutations.py against sources with a deliberate fault.
//
// FAE_TYPE: element type. FAE_KERNELS: which kernels, one of the numbers below, plus 4 for those of modified
// scores. Returns 0 when nothing is wrong; else prints "fault: ..." (of the emulator) or "mismatch: ..." and
// returns 1.
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/bwd_aux/head_grad.h"
#include "cuda/bwd_aux/round_query_grad.h"
#include "cuda/bwd_aux/row_stats.h"
#include "cuda/fwd_aux/merge_partials.h"
#include "cuda/launch/launch.h"
#include "cuda/sm80/forward.h"
#include "cuda/sm80/key_grad.h"
#include "cuda/sm80/query_grad.h"
#include "cuda_case.h"
#include "kernel_test.h"

#define FAE_FORWARD 1        // head dims up to 64
#define FAE_FORWARD_SPLIT 2  // any, in slices
#define FAE_KEY_GRAD 3       // with atomics for dQ
#define FAE_QUERY_GRAD 4
#define FAE_PASS ((FAE_KERNELS - 1) % 4 + 1)

namespace fae::cuda {
namespace {

constexpr DType kType = DTypeOf<FAE_TYPE>::value;
constexpr bool kBackward = FAE_PASS >= FAE_KEY_GRAD;
constexpr bool kModified = FAE_KERNELS > 4;

#if FAE_PASS <= FAE_FORWARD_SPLIT
const AddVariant kMerge(make_variant<MergePartials<FAE_TYPE, kModified>>(Pass::kMergePartials, kType, 0, true,
                                                                         kModified));
#endif
#if FAE_PASS == FAE_FORWARD
const AddVariant kForward{
    make_variant<sm80::Forward<FAE_TYPE, 64, false, kModified>>(Pass::kForward, kType, 64, false, kModified)};
#elif FAE_PASS == FAE_FORWARD_SPLIT
constexpr int kSlice = sizeof(FAE_TYPE) == 2 ? 128 : 64;
const AddVariant kForward{
    make_variant<sm80::Forward<FAE_TYPE, kSlice, true, false>>(Pass::kForward, kType, kSlice, true, false)};
#else
const AddVariant kRowStats(make_variant<RowStatsKernel<FAE_TYPE, kModified>>(Pass::kRowStats, kType, 0, true,
                                                                             kModified));
const AddVariant kKeyGrad{
    make_variant<sm80::KeyGrad<FAE_TYPE, 64, false, kModified>>(Pass::kKeyGrad, kType, 64, false, kModified)};
#if FAE_PASS == FAE_KEY_GRAD
const AddVariant kRound{
    make_variant<RoundQueryGrad<FAE_TYPE, kModified>>(Pass::kRoundQueryGrad, kType, 0, true, kModified)};
#endif
#if FAE_PASS == FAE_QUERY_GRAD || FAE_KERNELS > 4  // which slopes of ALiBi need in any case
const AddVariant kQueryGrad{make_variant<sm80::QueryGrad<FAE_TYPE, 64, false, kModified>>(
    Pass::kQueryGrad, kType, 64, false, kModified)};
#endif
const AddVariant kHeadGrad(make_variant<HeadGrad<FAE_TYPE>>(Pass::kHeadGrad, kType, 0, true, true));
#endif

}  // namespace
}  // namespace fae::cuda

namespace fae::testing {
namespace {

std::vector<CaseSpec> problems() {
  std::vector<CaseSpec> all;
  const auto add = [&](CaseSpec s, Causal causal = Causal::kNone, int64_t left = -1, int64_t right = -1) {
    s.dtype = cuda::kType;
    s.causal = causal;
    s.window_left = left;
    s.window_right = right;
    all.push_back(s);
  };
  if (cuda::kModified) {
    add(shape("sinks", 2, 6, 2, 37, 70, 40, 56), Causal::kBottomRight);
    all.back().sinks = true;
    add(shape("sinks_of_blind_rows", 1, 2, 1, 90, 60, 64, 64), Causal::kBottomRight);
    all.back().sinks = all.back().dlse = true;
    add(shape("alibi", 2, 6, 2, 37, 70, 40, 56), Causal::kBottomRight);
    all.back().alibi = all.back().alibi_per_batch = true;
    add(shape("alibi_softcap", 2, 2, 1, 90, 60, 64, 64));
    all.back().alibi = true;
    all.back().softcap = 2;
    add(shape("dropout", 2, 6, 2, 37, 70, 40, 56), Causal::kBottomRight);
    all.back().dropout_p = 0.3;
    add(shape("everything", 1, 4, 2, 40, 70, 64, 64), Causal::kBottomRight, 50);
    all.back().alibi = all.back().sinks = all.back().dlse = true;
    all.back().dropout_p = 0.4;
    return all;
  }
  if (FAE_PASS == FAE_FORWARD_SPLIT) {
    // The last item of the ring is in its first slot, and in its second.
    add(shape("odd_items", 1, 1, 1, 70, 90, 200, 264));
    add(shape("even_items", 1, 2, 1, 70, 90, 264, 200), Causal::kBottomRight);
    return all;
  }
  add(shape("tails", 2, 2, 2, 37, 70, 40, 56));                        // of rows, keys and columns
  add(shape("odd", 1, 2, 1, 20, 70, 37, 35));                          // element by element
  add(shape("group", 1, 6, 2, 50, 90, 16, 16), Causal::kBottomRight);  // tiles begin within a group
  add(shape("tiles", 1, 1, 1, 129, 300, 64, 64));  // all of the ring; one row is left over
  add(shape("window", 1, 1, 1, 150, 300, 64, 64), Causal::kNone, 70, 5);
  add(shape("blind_rows", 1, 1, 1, 150, 100, 16, 16), Causal::kBottomRight);
  add(shape("sections", 3, 1, 1, 150, 140, 16, 16));  // of two heads and of one, see device_of
  add(shape("lengths", 3, 1, 1, 40, 150, 64, 64));
  all.back().kv_lengths = {0, 33, 141};
  add(shape("packed", 4, 2, 1, 47, 100, 16, 24), Causal::kBottomRight);
  all.back().starts_q = {0, 13, 13, 60, 100};
  all.back().starts_kv = {0, 29, 40, 140, 185};
  add(shape("intervals", 2, 2, 1, 70, 150, 16, 16));
  all.back().intervals = 1;
  add(shape("blocks", 2, 2, 1, 70, 150, 16, 16));
  all.back().mask = Extent::kFull;
  all.back().mask_visible = 0.5;
  all.back().mask_block_q = 7;
  all.back().mask_block_kv = 20;
  return all;
}

cuda::Device device_of(const CaseSpec& spec) {
  cuda::Device device;
  device.shared_bytes = 163 * 1024;
  if (spec.name == "sections")
    device.l2_bytes = 2 * 2 * spec.seq_kv * (spec.dim + spec.dim_v) * size_of(spec.dtype);
  return device;
}

// Rows that come out not finite are made good, at a price; finite inputs never pay it.
bool computed_again(const Case& c) {
  if (c.spec.dim % 8 != 0) return false;  // rows element by element come from the same file
  for (const cuda::emu::AccessSite& site : cuda::emu::access_sites()) {
    if (site.file == "csrc/cuda/tile/exact_row.h") return true;
  }
  return false;
}

std::string wrong_forward(Case& c, const EmulatedRun& run) {
  const ForwardResult wanted = exact_forward(c), got = run_forward(c, run);
  std::string text = mismatch(got.out, wanted.out, forward_tolerance(cuda::kType));
  if (text.empty()) text = mismatch(got.lse, wanted.lse, forward_tolerance(DType::kFloat32));
  return text;
}

std::string wrong_splits(Case& c, EmulatedRun run) {
  run.options.num_splits = 3;
  return wrong_forward(c, run);
}

// The last row's result must have the same bits when it comes alone.
std::string wrong_bits(Case& c, const EmulatedRun& run) {
  const ForwardResult whole = run_forward(c, run);
  const int64_t begin = c.spec.seq_q - 1;
  ForwardCall call = c.forward_call();
  const int64_t size = size_of(c.spec.dtype);
  call.problem.seq_q = 1;
  call.problem.q.data =
      static_cast<std::byte*>(call.problem.q.data) + begin * call.problem.q.stride[2] * size;
  call.out.data = static_cast<std::byte*>(call.out.data) + begin * call.out.stride[2] * size;
  call.problem.masking.band.lo += begin;
  call.problem.masking.band.hi += begin;
  call.lse = {};
  launch_forward(c, call, 0, run);
  return identical(c.out.values(), whole.out) ? "" : "bits depend on the other rows";
}

// The keys and values of a case in pages, in no order.
class Pages {
 public:
  static constexpr int64_t kSize = 16;

  explicit Pages(const Case& c)
      : keys_((c.spec.seq_kv + kSize - 1) / kSize), pages_(c.spec.batch * keys_ + 2) {
    const CaseSpec& s = c.spec;
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t n = 0; n < keys_; ++n) table_.push_back(int32_t((b * keys_ + n) * 5 % (pages_ - 1)));
    }
    k_ = in_pages(c.k);
    v_ = in_pages(c.v);
  }

  void use_in(Problem* p) const {
    p->k = k_.view();
    p->v = v_.view();
    p->cache.capacity = keys_ * kSize;
    p->cache.length = p->seq_kv;
    p->cache.pages = {{table_.data(), keys_, false}, 1, kSize, pages_};
  }
  const HostTensor& k() const { return k_; }
  const HostTensor& v() const { return v_; }

 private:
  HostTensor in_pages(const HostTensor& from) const {
    const int64_t shape[4] = {pages_, from.shape()[1], kSize, from.shape()[3]};
    HostTensor to(from.dtype(), shape, Layout::kBshd, Strides::kContiguous);
    to.fill(0);
    for (int64_t b = 0; b < from.shape()[0]; ++b) {
      for (int64_t h = 0; h < from.shape()[1]; ++h) {
        for (int64_t j = 0; j < from.shape()[2]; ++j) {
          for (int64_t x = 0; x < from.shape()[3]; ++x) {
            to.set(table_[size_t(b * keys_ + j / kSize)], h, j % kSize, x, from.get(b, h, j, x));
          }
        }
      }
    }
    return to;
  }

  int64_t keys_, pages_;
  std::vector<int32_t> table_;
  HostTensor k_, v_;
};

std::string wrong_pages(Case& c, const EmulatedRun& run) {
  const Pages pages(c);
  ForwardCall call = c.forward_call();
  pages.use_in(&call.problem);
  call.lse = {};
  const auto range = [](const HostTensor& t) {
    return cuda::emu::ScopedRange(t.bytes(), t.byte_count(), "pages", cuda::emu::Access::kRead);
  };
  const cuda::emu::ScopedRange k = range(pages.k()), v = range(pages.v());
  launch_forward(c, call, 0, run);
  return mismatch(c.out.values(), exact_forward(c).out, forward_tolerance(cuda::kType));
}

std::string wrong_backward(Case& c, const EmulatedRun& run) {
  const BackwardResult wanted = exact_backward(c);
  run_forward(c, cpu::Isa::kScalar);  // the same on every machine
  launch_backward(c, c.backward_call(), run);
  const double tolerance = backward_tolerance(cuda::kType);
  std::string text = mismatch(c.dq.values(), wanted.dq, tolerance);
  if (text.empty()) text = mismatch(c.dk.values(), wanted.dk, tolerance);
  if (text.empty()) text = mismatch(c.dv.values(), wanted.dv, tolerance);
  if (text.empty()) text = mismatch(c.dalibi.values(), wanted.dalibi, tolerance);
  if (text.empty()) text = mismatch(c.dsinks.values(), wanted.dsinks, tolerance);
  return text;
}

int run_all() {
  for (const CaseSpec& spec : problems()) {
    Case c(spec);
    for (uint64_t seed = 1; seed <= 3; ++seed) {
      EmulatedRun run;
      run.seed = seed;
      run.device = device_of(spec);
      run.count = seed == 1;
      cuda::emu::reset_counters();
      run.options.deterministic = FAE_PASS == FAE_QUERY_GRAD;
      std::string text;
      try {
        text = cuda::kBackward ? wrong_backward(c, run) : wrong_forward(c, run);
        if (text.empty() && computed_again(c)) text = "finite rows were computed again";
        if (text.empty() && FAE_KERNELS == FAE_FORWARD && spec.name == "tails") text = wrong_pages(c, run);
        if (text.empty() && !cuda::kBackward) text = wrong_splits(c, run);
        if (text.empty() && !cuda::kBackward && spec.batch == 1 && spec.heads_q == 1)
          text = wrong_bits(c, run);
      } catch (const cuda::emu::Fault& fault) {
        std::printf("fault: %s, seed %d: %s\n", spec.name.c_str(), int(seed), fault.what());
        return 1;
      } catch (const std::runtime_error& error) {
        text = error.what();  // an output that was not written everywhere
      }
      if (!text.empty()) {
        std::printf("mismatch: %s, seed %d: %s\n", spec.name.c_str(), int(seed), text.c_str());
        return 1;
      }
    }
  }
  return 0;
}

}  // namespace
}  // namespace fae::testing

int main() { return fae::testing::run_all(); }
