// Random attention problems in guarded memory, and their exact results.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "core/describe.h"
#include "cpu/api.h"
#include "guarded.h"

namespace fae::testing {

// How a tensor lies in memory: contiguous in its layout; with the head dim apart; or with
// gaps between rows. kBroadcastKv also shares one K/V head and batch by stride 0.
enum class Strides { kContiguous, kColumnsApart, kRowsApart, kBroadcastKv };
// Which axes of a mask or bias exist; the others are broadcast.
enum class Extent { kNone, kFull, kPerHead, kPerBatch, kRowOnly, kColumnOnly, kSingle };

struct CaseSpec {
  std::string name;
  DType dtype = DType::kFloat32;
  int64_t batch = 1, heads_q = 1, heads_kv = 1, seq_q = 1, seq_kv = 1, dim = 1, dim_v = 1;
  Causal causal = Causal::kNone;
  int64_t window_left = -1, window_right = -1;
  std::optional<double> scale;
  double softcap = 0;
  Extent mask = Extent::kNone;
  double mask_visible = 0.7;  // fraction
  Extent bias = Extent::kNone;
  DType bias_dtype = DType::kFloat32;
  double bias_hidden = 0;  // fraction of -inf
  std::vector<int64_t> kv_lengths;
  bool int32_lengths = false;
  bool dlse = false;  // a gradient arrives through lse too
  bool alibi = false, alibi_per_batch = false;
  bool sinks = false;
  double dropout_p = 0;
  int64_t intervals = 0;                        // interval masks
  int64_t mask_block_q = 1, mask_block_kv = 1;  // a mask of extent kFull then has blocks
  std::vector<int32_t> starts_q, starts_kv;     // packed sequences: then seq_q and seq_kv are the longest
  Layout layout = Layout::kBshd;
  Strides strides = Strides::kContiguous;
};

// One tensor of four axes in attention order, and the memory behind it.
class HostTensor {
 public:
  HostTensor() = default;
  // shape: (batch, head, row, column).
  HostTensor(DType dtype, const int64_t shape[4], Layout layout, Strides strides);
  View4 view() const { return view_; }
  DType dtype() const { return dtype_; }
  const int64_t* shape() const { return shape_; }
  int64_t count() const { return shape_[0] * shape_[1] * shape_[2] * shape_[3]; }
  double get(int64_t b, int64_t h, int64_t r, int64_t c) const;
  void set(int64_t b, int64_t h, int64_t r, int64_t c, double x);
  // All elements in (batch, head, row, column) order.
  std::vector<double> values() const;
  void fill_normal(uint32_t seed, double deviation = 1);
  void fill(double x);
  const std::byte* bytes() const { return memory_ ? memory_->data() : nullptr; }
  size_t byte_count() const { return memory_ ? memory_->size() : 0; }

 private:
  DType dtype_ = DType::kFloat32;
  int64_t shape_[4] = {0, 0, 0, 0};
  View4 view_;
  std::optional<Guarded<std::byte>> memory_;
};

// A problem with its inputs, and room for what forward and backward write.
struct Case {
  explicit Case(const CaseSpec& spec, uint32_t seed = 1);

  CaseSpec spec;
  Problem problem;
  HostTensor q, k, v, bias, dout, out, dq, dk, dv, dbias;
  HostTensor slopes, sinks, dalibi, dsinks;  // (batch or 1, heads_q, 1, 1)
  std::vector<int32_t> labels, bounds;       // (intervals, batch, seq_q), (intervals, batch, seq_kv, 2)
  int64_t rng_state[2] = {1234567, 89};
  std::optional<Guarded<uint8_t>> mask;
  std::optional<Guarded<int64_t>> lengths64;
  std::optional<Guarded<int32_t>> lengths32;
  std::optional<Guarded<std::byte>> lse, dlse;

  DType lse_dtype() const { return fae::lse_dtype(spec.dtype); }
  bool packed() const { return !spec.starts_q.empty(); }
  // Rows of q and of k, in one batch.
  int64_t rows_q() const { return packed() ? spec.starts_q.back() + 2 : spec.seq_q; }
  int64_t rows_kv() const { return packed() ? spec.starts_kv.back() + 3 : spec.seq_kv; }
  int64_t lse_count() const { return (packed() ? 1 : spec.batch) * spec.heads_q * rows_q(); }
  std::vector<double> lse_values() const;
  ForwardCall forward_call();
  BackwardCall backward_call();
  // Poisons everything that forward and backward write.
  void clear_results();

 private:
  void add_extras(uint32_t seed);
  static PerHead head_values(const HostTensor& t);
  View4 one_batch(const HostTensor& t) const;
  template <class Void>
  RowValues<Void> rows_of(void* data) const;
};

struct ForwardResult { std::vector<double> out, lse; };
struct BackwardResult { std::vector<double> dq, dk, dv, dbias, dalibi, dsinks; };

// With the kernels of an ISA; block_q overrides the planner's choice when positive.
ForwardResult run_forward(Case& c, cpu::Isa isa, int threads = 1, int64_t block_q = 0);
// Runs forward first.
BackwardResult run_backward(Case& c, cpu::Isa isa, int threads = 1);
// The double oracle on the same (rounded) inputs, results not rounded to the dtype.
ForwardResult exact_forward(Case& c);
BackwardResult exact_backward(Case& c);

// Bitwise, NaN equal to NaN.
bool identical(const std::vector<double>& a, const std::vector<double>& b);
// Empty, or the worst element if it is further off than `tolerance` x (0.1 + largest finite
// |wanted|); non-finite elements must be the same.
std::string mismatch(const std::vector<double>& got, const std::vector<double>& wanted, double tolerance);

}  // namespace fae::testing
