// One attention problem, described once; kernels, checks, planners and
// explanations all read this value.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/key_cache.h"
#include "core/mask.h"
#include "core/philox.h"
#include "core/score_mod.h"
#include "core/tensor_view.h"

namespace fae {

// Sequences with lengths of their own, packed one behind the other: sequence b is rows
// [starts_q[b], starts_q[b + 1]) of q and [starts_kv[b], starts_kv[b + 1]) of k and v.
struct Packing {
  Integers starts_q, starts_kv;  // (batch + 1); both, none, or with a cache of keys only the former
  int64_t total_q = 0, total_kv = 0;

  FAE_HD bool present() const { return starts_q.present(); }
};

// Packed sequences in one tensor of `total` rows, each taken to be no longer than `most`.
struct SequenceRows {
  struct Range { int64_t begin, end; };
  Integers starts;
  int64_t total = 0, most = 0;

  // Of sequence b; within the tensor whatever starts say.
  FAE_HD Range of(int64_t b) const {
    const int64_t begin = within(starts.at(b)), end = within(starts.at(b + 1));
    return {begin, end < begin ? begin : end - begin > most ? begin + most : end};
  }
  // Part n of batch + 2 of the rows that no sequence has: before the first, behind each, behind the last.
  // Whatever starts say, these and the sequences cover the tensor.
  FAE_HD Range unowned(int64_t n, int64_t batch) const {
    const int64_t begin = n == 0 ? 0 : n <= batch ? of(n - 1).end : within(starts.at(batch));
    return {begin, n <= batch ? within(starts.at(n)) : total};
  }

 private:
  FAE_HD int64_t within(int64_t row) const { return row < 0 ? 0 : row > total ? total : row; }
};

// What of a problem depends on the batch.
struct Sequence {
  int64_t first_query = 0, first_key = 0;  // rows of q, and of k and v, that come before its own
  int64_t key_batch = 0;                   // entry of k and v; with pages: of their table
  int64_t seq_q = 0, seq_kv = 0;
  int64_t kv_length = 0;  // keys at or past it are hidden
  Band band;
};

struct Problem {
  DType dtype = DType::kFloat32;
  int64_t batch = 0;
  int64_t heads_q = 0;
  int64_t heads_kv = 0;
  int64_t seq_q = 0;   // of packed sequences: a bound of their lengths
  int64_t seq_kv = 0;  // same
  int64_t dim = 0;
  int64_t dim_v = 0;

  View4 q;  // (batch, heads_q, seq_q, dim); packed: (1, heads_q, total_q, dim) with batch stride 0
  View4 k;  // (batch, heads_kv, seq_kv, dim)
  View4 v;  // (batch, heads_kv, seq_kv, dim_v)

  Masking masking;
  BandRule band_rule;  // of masking.band, and of sequences with lengths of their own
  ScoreMod score;
  Dropout dropout;
  Packing packing;
  KeyCache cache;  // with pages, k and v are (pages, heads_kv, page_size, dim)

  FAE_HD int64_t group() const { return heads_kv ? heads_q / heads_kv : 0; }
  // Query rows that share one K/V head: queries of all heads of a group, packed
  // query-major (row = query * group + head_in_group) so that neighbouring rows
  // see nearly the same keys.
  FAE_HD int64_t packed_rows() const { return seq_q * group(); }
  // Nothing to compute: the output is empty, or all zeros for want of keys.
  FAE_HD bool has_output() const { return batch > 0 && heads_q > 0 && seq_q > 0; }
  // Rows of q; of packed sequences also those behind the last one, whose result is 0.
  FAE_HD bool has_rows() const {
    return packing.present() ? heads_q > 0 && packing.total_q > 0 : has_output();
  }
  // Whether something may hide a key from a query: a tile of scores is not known to be full.
  FAE_HD bool has_mask() const { return masking.mask.present() || masking.intervals.present(); }

  // Whether sequences have lengths of their own.
  FAE_HD bool ragged() const { return packing.present() || cache.present(); }

  // Of packed sequences.
  FAE_HD SequenceRows query_rows() const { return {packing.starts_q, packing.total_q, seq_q}; }
  FAE_HD SequenceRows key_rows() const { return {packing.starts_kv, packing.total_kv, seq_kv}; }

  // Whatever starts and lengths say, it lies within q and k.
  FAE_HD Sequence sequence(int64_t b) const {
    Sequence s;
    s.key_batch = b;
    s.seq_q = seq_q;
    s.seq_kv = seq_kv;
    s.band = masking.band;
    if (packing.starts_q.present()) place(query_rows(), b, &s.first_query, &s.seq_q);
    if (packing.starts_kv.present()) place(key_rows(), b, &s.first_key, &s.seq_kv);
    if (cache.present()) {
      s.first_key = cache.first(b);
      s.seq_kv = cache.end(b) > s.first_key ? cache.end(b) - s.first_key : 0;
      s.key_batch = cache.entry(b);
    }
    if (ragged()) s.band = band_rule.of(s.seq_q, s.seq_kv);
    s.kv_length = masking.kv_lengths.at(b, s.seq_kv);
    return s;
  }

  // Where key (or value) j of a sequence begins in k (or v).
  FAE_HD int64_t key_offset(const View4& x, const Sequence& s, int64_t head_kv, int64_t j) const {
    const int64_t row = s.first_key + j;
    if (!cache.pages.present()) return x.offset(s.key_batch, head_kv, row);
    const int64_t size = cache.pages.page_size;
    return x.offset(cache.pages.at(s.key_batch, row / size), head_kv, row % size);
  }

 private:
  FAE_HD static void place(const SequenceRows& rows, int64_t b, int64_t* first, int64_t* length) {
    const SequenceRows::Range range = rows.of(b);
    *first = range.begin;
    *length = range.end - range.begin;
  }
};

// Whether query i of head_q may see key j, all rules together. Kernels decide by tiles;
// this per-element form is for single rows and for tests.
FAE_HD inline bool is_visible(const Problem& p, const Sequence& sequence, int64_t b, int64_t head_q,
                              int64_t i, int64_t j) {
  const Masking& m = p.masking;
  const Band& band = sequence.band;
  if (j < i + band.lo || j > i + band.hi || j >= sequence.kv_length) return false;
  if (m.mask.present() && !m.mask.sees(b, head_q, i, j)) return false;
  if (!m.intervals.sees(b, i, j)) return false;
  const View4& bias = p.score.bias;
  if (!bias.present()) return true;
  const double x =
      load_as_double(bias.data, p.score.bias_dtype, bias.offset(b, head_q, i) + j * bias.stride[3]);
  return !(x < 0 && x - x != 0);  // -inf hides
}

// The type of the log-sum-exp between forward and backward. For fp32 it is wider than
// what callers see: P = exp(score - lse), so rounding lse to fp32 would put a relative
// error of half an ulp of lse, several ulp of P, into a whole row of gradients.
FAE_HD constexpr DType lse_dtype(DType t) {
  return t == DType::kFloat32 || t == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// One number per query row, the rows of a head one behind the other.
template <class Void>
struct RowValues {
  Void* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0;

  FAE_HD bool present() const { return data != nullptr; }
  FAE_HD int64_t index(int64_t b, int64_t head_q, int64_t row) const {
    return b * batch_stride + head_q * head_stride + row;
  }
};

struct ForwardCall {
  Problem problem;
  View4 out;            // (batch, heads_q, seq_q, dim_v), in problem.dtype; packed like q
  RowValues<void> lse;  // (batch, heads_q, seq_q), packed (heads_q, total_q); in lse_dtype(), or none
};

struct BackwardCall {
  Problem problem;
  View4 out;                   // (batch, heads_q, seq_q, dim_v): the forward result
  View4 dout;                  // same shape
  RowValues<const void> lse;   // (batch, heads_q, seq_q) in lse_dtype()
  int64_t lse_count = 0;       // its elements
  RowValues<const void> dlse;  // same shape and type, or none
  // What rounding took from lse, to be added to it; same shape and type. None: nothing.
  RowValues<void> lse_low;
  View4 dq;     // (batch, heads_q, seq_q, dim)
  View4 dk;     // (batch, heads_kv, seq_kv, dim)
  View4 dv;     // (batch, heads_kv, seq_kv, dim_v)
  View4 dbias;  // bias's own shape (stride 0 where it broadcasts), score.bias_dtype; or none
  int64_t dbias_shape[4] = {0, 0, 0, 0};
  PerHead dalibi;  // shaped like score.alibi, or none
  PerHead dsinks;  // shaped like score.sinks, or none
  // Terms of the two sums above, one per row like lse, in the arithmetic type: for kernels to leave.
  RowValues<void> dalibi_rows, dsink_rows;
};

}  // namespace fae
