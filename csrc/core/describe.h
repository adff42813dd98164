// What a caller handed in, before anything is believed about it.
//
// A front end (the torch ops, the pybind11 module, a test) fills a CallDesc;
// validate() says what is wrong with it; make_problem() turns a valid one into a
// Problem. The same predicate so feeds error texts, dispatch and explanations.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "core/dtype.h"
#include "core/mask.h"
#include "core/problem.h"

namespace fae {

enum class Layout : uint8_t { kBshd, kBhsd };

struct TensorDesc {
  static constexpr int kMaxRank = 8;
  bool present = false;
  DType dtype = DType::kFloat32;
  const char* dtype_name = nullptr;  // for kOther
  const char* device = "cpu";
  int rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};
  void* data = nullptr;
};

struct CallDesc {
  TensorDesc q, k, v;       // rank 4, 3 (no batch) or 2 (one head, no batch), in `layout`
  TensorDesc mask;          // bool, broadcastable to (batch, heads_q, seq_q, seq_kv), or to blocks of them
  TensorDesc bias;          // floating, broadcastable to (batch, heads_q, seq_q, seq_kv)
  TensorDesc kv_lengths;    // (batch,) int32 or int64
  TensorDesc out;           // optional preallocated result
  TensorDesc alibi_slopes;  // (heads_q,) or (batch, heads_q), floating
  TensorDesc sinks;         // (heads_q,), floating
  TensorDesc rng_state;     // (2,) int64: seed, offset; with dropout_p > 0
  TensorDesc row_labels;    // (n, batch or 1, seq_q) int32, see Intervals
  TensorDesc key_bounds;    // (n, batch or 1, seq_kv, 2) int32
  TensorDesc cu_seqlens_q, cu_seqlens_k;  // (batch + 1,) int32 or int64; q, k and v are packed then
  Layout layout = Layout::kBshd;
  Causal causal = Causal::kNone;
  int64_t window_left = -1;
  int64_t window_right = -1;
  std::optional<double> scale;  // default 1 / sqrt(dim)
  double softcap = 0.0;
  double dropout_p = 0.0;
  int64_t mask_block_q = 1;
  int64_t mask_block_kv = 1;
  int64_t max_seqlen_q = -1;  // bounds of the lengths of packed sequences; -1 unknown
  int64_t max_seqlen_k = -1;

  bool packed() const { return cu_seqlens_q.present; }
};

struct CallError {
  enum class Kind : uint8_t { kValue, kType, kNotImplemented, kRuntime };
  Kind kind;
  std::string text;
};

// layout 0 bshd, 1 bhsd; causal 0 none, 1 bottom right, 2 top left: as numbers, since
// neither operator schemas nor dicts know our enums. Anything else is an error.
std::optional<CallError> set_layout_and_causal(CallDesc* call, int64_t layout, int64_t causal);

std::optional<CallError> validate(const CallDesc& call);

// The axes of a rank 2, 3 or 4 tensor in `layout`, as (batch, heads, seq, dim).
struct Axes4 {
  int64_t shape[4];
  int64_t stride[4];
};
Axes4 attention_axes(const TensorDesc& t, Layout layout);
// The same as kernels see it.
View4 attention_view(const TensorDesc& t, Layout layout);

// Sizes of a call whose shapes have been checked; of packed sequences the longest ones.
struct CallSizes {
  int64_t batch, heads_q, heads_kv, seq_q, seq_kv;
  // Packed: false where no bound was given and the starts cannot be read here.
  bool known_q = true, known_kv = true;
};
CallSizes sizes_of(const CallDesc& call);

// Right-aligned broadcast of a rank <= 4 tensor: its shape with leading ones, and a view
// with stride 0 where its size is 1.
View4 broadcast_view(const TensorDesc& t, int64_t shape[4]);

// A (heads_q,) or (batch, heads_q) tensor as kernels see it; absent if it is.
PerHead per_head(const TensorDesc& t);

// A vector of int32 or int64 as kernels see it; absent if it is.
Integers integers_of(const TensorDesc& t);

// The longest of the sequences that begin at cu_seqlens, at most `total`; where the starts cannot be read
// here, *known is false unless a bound was given (else -1).
int64_t longest_sequence(const TensorDesc& cu_seqlens, int64_t total, int64_t given, bool* known);

// Requires validate(call) to have found nothing.
Problem make_problem(const CallDesc& call);

// "(2, 3)", "(2,)", "()"
std::string shape_text(const int64_t* shape, int64_t rank);
inline std::string shape_text(const TensorDesc& t) { return shape_text(t.shape, t.rank); }

// The refusal of a tensor whose shape is too long for a TensorDesc.
CallError too_many_axes(const char* name, const int64_t* shape, int64_t rank);

}  // namespace fae
