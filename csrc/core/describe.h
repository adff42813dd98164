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
  TensorDesc q, k, v;     // rank 4, 3 (no batch) or 2 (one head, no batch), in `layout`
  TensorDesc mask;        // bool, broadcastable to (batch, heads_q, seq_q, seq_kv)
  TensorDesc bias;        // floating, same
  TensorDesc kv_lengths;  // (batch,) int32 or int64
  TensorDesc out;         // optional preallocated result
  Layout layout = Layout::kBshd;
  Causal causal = Causal::kNone;
  int64_t window_left = -1;
  int64_t window_right = -1;
  std::optional<double> scale;  // default 1 / sqrt(dim)
  double softcap = 0.0;
};

struct CallError {
  enum class Kind : uint8_t { kValue, kType, kNotImplemented };
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

// Right-aligned broadcast of a rank <= 4 tensor: its shape with leading ones, and a view
// with stride 0 where its size is 1.
View4 broadcast_view(const TensorDesc& t, int64_t shape[4]);

// Requires validate(call) to have found nothing.
Problem make_problem(const CallDesc& call);

// "(2, 3)", "(2,)", "()"
std::string shape_text(const int64_t* shape, int64_t rank);
inline std::string shape_text(const TensorDesc& t) { return shape_text(t.shape, t.rank); }

// The refusal of a tensor whose shape is too long for a TensorDesc.
CallError too_many_axes(const char* name, const int64_t* shape, int64_t rank);

}  // namespace fae
