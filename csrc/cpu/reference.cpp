#include "cpu/reference.h"

#include <cmath>
#include <limits>
#include <vector>

namespace fae::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

double load(const View4& view, DType dtype, int64_t b, int64_t h, int64_t row, int64_t column) {
  return load_as_double(view.data, dtype, view.offset(b, h, row) + column * view.stride[3]);
}

void store(const View4& view, DType dtype, int64_t b, int64_t h, int64_t row, int64_t column, double x) {
  store_from_double(view.data, dtype, view.offset(b, h, row) + column * view.stride[3], x);
}

void load_row(const View4& view, DType dtype, int64_t b, int64_t h, int64_t row,
              std::vector<double>* values) {
  for (size_t c = 0; c < values->size(); ++c) (*values)[c] = load(view, dtype, b, h, row, int64_t(c));
}

// One query row: which keys it sees, and the softmax over them.
struct Row {
  std::vector<int64_t> keys;  // visible ones, ascending
  std::vector<double> prob;   // probability of keys[n]
  std::vector<double> kept;   // what dropout multiplies it with
  std::vector<double> slope;  // d score / d (scale * dot) of keys[n]
  std::vector<double> q;      // (dim)
  double sink_prob = 0;
  double lse = -kInfinity;

  bool empty() const { return keys.empty(); }
};

double distance(const Sequence& sequence, int64_t i, int64_t j) {
  return std::fabs(double(i + sequence.seq_kv - sequence.seq_q - j));
}

// Spelled out once more, so that the oracle does not inherit a mistake of the shared one.
bool row_sees_key(const Problem& p, const Sequence& sequence, int64_t b, int64_t h, int64_t i, int64_t j) {
  const Masking& masking = p.masking;
  if (j < i + sequence.band.lo || j > i + sequence.band.hi) return false;
  if (j >= masking.kv_lengths.at(b, sequence.seq_kv)) return false;
  const BoolMask& mask = masking.mask;
  if (mask.present() &&
      !static_cast<const uint8_t*>(
          mask.data)[mask.offset(b, h, i / mask.block_q) + j / mask.block_kv * mask.stride[3]]) {
    return false;
  }
  const Intervals& x = masking.intervals;
  for (int64_t m = 0; m < x.count; ++m) {
    const int32_t label = x.labels[m * x.label_stride[0] + b * x.label_stride[1] + i * x.label_stride[2]];
    const int32_t* bounds = x.bounds + m * x.bound_stride[0] + b * x.bound_stride[1] + j * x.bound_stride[2];
    if (label < bounds[0] || label >= bounds[x.bound_stride[3]]) return false;
  }
  const View4& bias = p.score.bias;
  return !bias.present() || load(bias, p.score.bias_dtype, b, h, i, j) != -kInfinity;
}

void softmax_row(const Problem& p, const Sequence& sequence, int64_t b, int64_t h, int64_t i, Row* row) {
  const ScoreMod& mod = p.score;
  const int64_t h_kv = h / p.group();
  row->keys.clear();
  row->prob.clear();
  row->kept.clear();
  row->slope.clear();
  row->q.resize(size_t(p.dim));
  load_row(p.q, p.dtype, b, h, sequence.first_query + i, &row->q);

  const double sink = p.score.sinks.present() ? p.score.sinks.at(b, h) : -kInfinity;
  double max = sink;
  const PhiloxKey key = p.dropout.present() ? p.dropout.key() : PhiloxKey{};
  for (int64_t j = 0; j < sequence.seq_kv; ++j) {
    if (!row_sees_key(p, sequence, b, h, i, j)) continue;
    double dot = 0;
    for (int64_t c = 0; c < p.dim; ++c)
      dot += row->q[size_t(c)] * load(p.k, p.dtype, b, h_kv, sequence.first_key + j, c);
    double score = mod.scale * dot;
    double slope = 1;
    if (mod.softcap > 0) {
      score = softcap_score(score, mod.softcap);
      slope = softcap_slope(score, mod.softcap);
    }
    if (mod.bias.present()) score += load(mod.bias, mod.bias_dtype, b, h, i, j);
    if (mod.alibi.present()) score -= mod.alibi.at(b, h) * distance(sequence, i, j);
    const bool kept = !p.dropout.present() || p.dropout.keeps(key, b, h, i, j);
    row->kept.push_back(kept ? p.dropout.keep_scale : 0.0);
    row->keys.push_back(j);
    row->prob.push_back(score);
    row->slope.push_back(slope);
    if (score > max || std::isnan(score)) max = score;  // a NaN stays the maximum
  }

  row->lse = -kInfinity;
  row->sink_prob = 0;
  if (max == -kInfinity) {
    row->keys.clear();  // each hidden by a bias, or infinitely far
    return;
  }
  row->sink_prob = std::exp(sink - max);
  double sum = row->sink_prob;
  for (double& x : row->prob) sum += (x = std::exp(x - max));
  for (double& x : row->prob) x /= sum;
  row->sink_prob /= sum;
  row->lse = max + std::log(sum);
}

// Rows from `begin` on, which belong to no sequence.
void clear_rows(const View4& x, DType dtype, int64_t heads, int64_t begin, int64_t end, int64_t columns) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t c = 0; c < columns; ++c) store(x, dtype, 0, h, row, c, 0.0);
    }
  }
}

}  // namespace

void reference_forward(const ForwardCall& call) {
  const Problem& p = call.problem;
  if (p.packing.present()) {
    const int64_t begin = p.packing.starts_q.at(p.batch), end = p.packing.total_q;
    clear_rows(call.out, p.dtype, p.heads_q, begin, end, p.dim_v);
    for (int64_t h = 0; h < p.heads_q && call.lse.present(); ++h) {
      for (int64_t row = begin; row < end; ++row)
        store_from_double(call.lse.data, lse_dtype(p.dtype), call.lse.index(0, h, row), -kInfinity);
    }
  }
  if (!p.has_output()) return;
  Row row;
  std::vector<double> out(static_cast<size_t>(p.dim_v));
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence sequence = p.sequence(b);
    for (int64_t h = 0; h < p.heads_q; ++h) {
      for (int64_t i = 0; i < sequence.seq_q; ++i) {
        softmax_row(p, sequence, b, h, i, &row);
        out.assign(size_t(p.dim_v), 0.0);
        for (size_t n = 0; n < row.keys.size(); ++n) {
          for (int64_t c = 0; c < p.dim_v; ++c) {
            out[size_t(c)] += row.prob[n] * row.kept[n] *
                              load(p.v, p.dtype, b, h / p.group(), sequence.first_key + row.keys[n], c);
          }
        }
        for (int64_t c = 0; c < p.dim_v; ++c)
          store(call.out, p.dtype, b, h, sequence.first_query + i, c, out[size_t(c)]);
        if (call.lse.present()) {
          store_from_double(call.lse.data, lse_dtype(p.dtype), call.lse.index(b, h, sequence.first_query + i),
                            row.lse);
        }
      }
    }
  }
}

namespace {

// Gradients of one (batch, K/V head), and of what they share, before rounding.
struct Gradients {
  std::vector<double> dq;              // (dim), one row
  std::vector<double> dk;              // (seq_kv, dim)
  std::vector<double> dv;              // (seq_kv, dim_v)
  std::vector<double> dbias;           // dbias_shape, contiguous
  std::vector<double> dalibi, dsinks;  // (batch, heads_q), (heads_q)
  int64_t dbias_stride[4] = {0, 0, 0, 0};
};

void size_shared_gradients(const BackwardCall& call, Gradients* g) {
  g->dalibi.assign(size_t(call.problem.batch * call.problem.heads_q), 0.0);
  g->dsinks.assign(size_t(call.problem.heads_q), 0.0);
  if (!call.dbias.present()) return;
  int64_t count = 1;
  for (int axis = 3; axis >= 0; --axis) {
    g->dbias_stride[axis] = call.dbias_shape[axis] == 1 ? 0 : count;
    count *= call.dbias_shape[axis];
  }
  g->dbias.assign(size_t(count), 0.0);
}

// With p the probabilities, dp = kept * dout . v and delta = sum p * dp:
//   d score = p * (dp - delta + dlse), the gradient of out and of lse together.
void backward_row(const BackwardCall& call, const Sequence& sequence, int64_t b, int64_t h, int64_t i,
                  const Row& row, Gradients* g) {
  const Problem& p = call.problem;
  const int64_t h_kv = h / p.group();
  g->dq.assign(size_t(p.dim), 0.0);
  if (row.empty()) return;

  std::vector<double> dout(static_cast<size_t>(p.dim_v));
  load_row(call.dout, p.dtype, b, h, sequence.first_query + i, &dout);
  std::vector<double> dp(row.keys.size());
  double delta = 0;
  for (size_t n = 0; n < row.keys.size(); ++n) {
    for (int64_t c = 0; c < p.dim_v; ++c) {
      dp[n] += dout[size_t(c)] * load(p.v, p.dtype, b, h_kv, sequence.first_key + row.keys[n], c);
    }
    dp[n] *= row.kept[n];
    delta += row.prob[n] * dp[n];
  }
  const double dlse = call.dlse.present() ? load_as_double(call.dlse.data, lse_dtype(p.dtype),
                                                           call.dlse.index(b, h, sequence.first_query + i))
                                          : 0.0;

  g->dsinks[size_t(h)] += row.sink_prob * (dlse - delta);
  for (size_t n = 0; n < row.keys.size(); ++n) {
    const int64_t j = row.keys[n];
    const double dscore = row.prob[n] * (dp[n] - delta + dlse);
    g->dalibi[size_t(b * p.heads_q + h)] -= dscore * distance(sequence, i, j);
    if (!g->dbias.empty()) {
      const int64_t* stride = g->dbias_stride;
      g->dbias[size_t(b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3])] += dscore;
    }
    const double ddot = dscore * row.slope[n] * p.score.scale;
    for (int64_t c = 0; c < p.dim; ++c) {
      g->dq[size_t(c)] += ddot * load(p.k, p.dtype, b, h_kv, sequence.first_key + j, c);
      g->dk[size_t(j * p.dim + c)] += ddot * row.q[size_t(c)];
    }
    for (int64_t c = 0; c < p.dim_v; ++c) {
      g->dv[size_t(j * p.dim_v + c)] += row.prob[n] * row.kept[n] * dout[size_t(c)];
    }
  }
}

void store_bias_gradient(const BackwardCall& call, const Gradients& g) {
  if (g.dbias.empty()) return;
  const int64_t* shape = call.dbias_shape;
  const int64_t* stride = g.dbias_stride;
  for (int64_t b = 0; b < shape[0]; ++b) {
    for (int64_t h = 0; h < shape[1]; ++h) {
      for (int64_t i = 0; i < shape[2]; ++i) {
        for (int64_t j = 0; j < shape[3]; ++j) {
          const int64_t at = b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3];
          store(call.dbias, call.problem.score.bias_dtype, b, h, i, j, g.dbias[size_t(at)]);
        }
      }
    }
  }
}

void store_head_gradients(const BackwardCall& call, const Gradients& g) {
  const Problem& p = call.problem;
  const PerHead &dalibi = call.dalibi, &dsinks = call.dsinks;
  for (int64_t h = 0; h < p.heads_q; ++h) {
    if (dsinks.present()) {
      store_from_double(dsinks.data, dsinks.dtype, h * dsinks.stride[1], g.dsinks[size_t(h)]);
    }
    double sum = 0;
    for (int64_t b = 0; b < p.batch && dalibi.present(); ++b) {
      sum = g.dalibi[size_t(b * p.heads_q + h)] + (dalibi.stride[0] == 0 ? sum : 0.0);
      store_from_double(dalibi.data, dalibi.dtype, b * dalibi.stride[0] + h * dalibi.stride[1], sum);
    }
  }
}

}  // namespace

void reference_backward(const BackwardCall& call) {
  const Problem& p = call.problem;
  if (p.packing.present()) {
    const int64_t queries = p.packing.starts_q.at(p.batch), keys = p.packing.starts_kv.at(p.batch);
    clear_rows(call.dq, p.dtype, p.heads_q, queries, p.packing.total_q, p.dim);
    clear_rows(call.dk, p.dtype, p.heads_kv, keys, p.packing.total_kv, p.dim);
    clear_rows(call.dv, p.dtype, p.heads_kv, keys, p.packing.total_kv, p.dim_v);
  }
  Gradients g;
  size_shared_gradients(call, &g);
  Row row;
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence sequence = p.sequence(b);
    for (int64_t h_kv = 0; h_kv < p.heads_kv; ++h_kv) {
      g.dk.assign(size_t(sequence.seq_kv * p.dim), 0.0);
      g.dv.assign(size_t(sequence.seq_kv * p.dim_v), 0.0);
      for (int64_t h = h_kv * p.group(); h < (h_kv + 1) * p.group(); ++h) {
        for (int64_t i = 0; i < sequence.seq_q; ++i) {
          softmax_row(p, sequence, b, h, i, &row);
          backward_row(call, sequence, b, h, i, row, &g);
          for (int64_t c = 0; c < p.dim; ++c)
            store(call.dq, p.dtype, b, h, sequence.first_query + i, c, g.dq[size_t(c)]);
        }
      }
      for (int64_t j = 0; j < sequence.seq_kv; ++j) {
        const int64_t key = sequence.first_key + j;
        for (int64_t c = 0; c < p.dim; ++c)
          store(call.dk, p.dtype, b, h_kv, key, c, g.dk[size_t(j * p.dim + c)]);
        for (int64_t c = 0; c < p.dim_v; ++c)
          store(call.dv, p.dtype, b, h_kv, key, c, g.dv[size_t(j * p.dim_v + c)]);
      }
    }
  }
  store_bias_gradient(call, g);
  store_head_gradients(call, g);
}

}  // namespace fae::cpu
