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
  std::vector<double> slope;  // d score / d (scale * dot) of keys[n]
  std::vector<double> q;      // (dim)
  double lse = -kInfinity;

  bool empty() const { return lse == -kInfinity; }
};

// Spelled out once more, so that the oracle does not inherit a mistake of the shared one.
bool row_sees_key(const Problem& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  const Masking& masking = p.masking;
  if (j < i + masking.band.lo || j > i + masking.band.hi) return false;
  if (j >= masking.kv_lengths.at(b, p.seq_kv)) return false;
  const View4& mask = masking.mask;
  if (mask.present() && !static_cast<const uint8_t*>(mask.data)[mask.offset(b, h, i) + j * mask.stride[3]]) {
    return false;
  }
  const View4& bias = p.score.bias;
  return !bias.present() || load(bias, p.score.bias_dtype, b, h, i, j) != -kInfinity;
}

void softmax_row(const Problem& p, int64_t b, int64_t h, int64_t i, Row* row) {
  const ScoreMod& mod = p.score;
  const int64_t h_kv = h / p.group();
  row->keys.clear();
  row->prob.clear();
  row->slope.clear();
  row->q.resize(size_t(p.dim));
  load_row(p.q, p.dtype, b, h, i, &row->q);

  double max = -kInfinity;
  for (int64_t j = 0; j < p.seq_kv; ++j) {
    if (!row_sees_key(p, b, h, i, j)) continue;
    double dot = 0;
    for (int64_t c = 0; c < p.dim; ++c) dot += row->q[size_t(c)] * load(p.k, p.dtype, b, h_kv, j, c);
    double score = mod.scale * dot;
    double slope = 1;
    if (mod.softcap > 0) {
      score = softcap_score(score, mod.softcap);
      slope = softcap_slope(score, mod.softcap);
    }
    if (mod.bias.present()) score += load(mod.bias, mod.bias_dtype, b, h, i, j);
    row->keys.push_back(j);
    row->prob.push_back(score);
    row->slope.push_back(slope);
    if (score > max || std::isnan(score)) max = score;  // a NaN stays the maximum
  }

  row->lse = -kInfinity;
  if (max == -kInfinity) return;
  double sum = 0;
  for (double& x : row->prob) sum += (x = std::exp(x - max));
  for (double& x : row->prob) x /= sum;
  row->lse = max + std::log(sum);
}

}  // namespace

void reference_forward(const ForwardCall& call) {
  const Problem& p = call.problem;
  if (!p.has_output()) return;
  Row row;
  std::vector<double> out(static_cast<size_t>(p.dim_v));
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads_q; ++h) {
      for (int64_t i = 0; i < p.seq_q; ++i) {
        softmax_row(p, b, h, i, &row);
        out.assign(size_t(p.dim_v), 0.0);
        for (size_t n = 0; n < row.keys.size() && !row.empty(); ++n) {
          for (int64_t c = 0; c < p.dim_v; ++c) {
            out[size_t(c)] += row.prob[n] * load(p.v, p.dtype, b, h / p.group(), row.keys[n], c);
          }
        }
        for (int64_t c = 0; c < p.dim_v; ++c) store(call.out, p.dtype, b, h, i, c, out[size_t(c)]);
        if (call.lse) {
          store_from_double(call.lse, lse_dtype(p.dtype), (b * p.heads_q + h) * p.seq_q + i, row.lse);
        }
      }
    }
  }
}

namespace {

// Gradients of one (batch, K/V head), and of the whole bias, before rounding.
struct Gradients {
  std::vector<double> dq;     // (dim), one row
  std::vector<double> dk;     // (seq_kv, dim)
  std::vector<double> dv;     // (seq_kv, dim_v)
  std::vector<double> dbias;  // dbias_shape, contiguous
  int64_t dbias_stride[4] = {0, 0, 0, 0};
};

void size_bias_gradient(const BackwardCall& call, Gradients* g) {
  if (!call.dbias.present()) return;
  int64_t count = 1;
  for (int axis = 3; axis >= 0; --axis) {
    g->dbias_stride[axis] = call.dbias_shape[axis] == 1 ? 0 : count;
    count *= call.dbias_shape[axis];
  }
  g->dbias.assign(size_t(count), 0.0);
}

// With p the probabilities, dp = dout . v and delta = sum p * dp:
//   d score = p * (dp - delta + dlse), the gradient of out and of lse together.
void backward_row(const BackwardCall& call, int64_t b, int64_t h, int64_t i, const Row& row, Gradients* g) {
  const Problem& p = call.problem;
  const int64_t h_kv = h / p.group();
  g->dq.assign(size_t(p.dim), 0.0);
  if (row.empty()) return;

  std::vector<double> dout(static_cast<size_t>(p.dim_v));
  load_row(call.dout, p.dtype, b, h, i, &dout);
  std::vector<double> dp(row.keys.size());
  double delta = 0;
  for (size_t n = 0; n < row.keys.size(); ++n) {
    for (int64_t c = 0; c < p.dim_v; ++c) {
      dp[n] += dout[size_t(c)] * load(p.v, p.dtype, b, h_kv, row.keys[n], c);
    }
    delta += row.prob[n] * dp[n];
  }
  const double dlse =
      call.dlse ? load_as_double(call.dlse, lse_dtype(p.dtype), (b * p.heads_q + h) * p.seq_q + i) : 0.0;

  for (size_t n = 0; n < row.keys.size(); ++n) {
    const int64_t j = row.keys[n];
    const double dscore = row.prob[n] * (dp[n] - delta + dlse);
    if (!g->dbias.empty()) {
      const int64_t* stride = g->dbias_stride;
      g->dbias[size_t(b * stride[0] + h * stride[1] + i * stride[2] + j * stride[3])] += dscore;
    }
    const double ddot = dscore * row.slope[n] * p.score.scale;
    for (int64_t c = 0; c < p.dim; ++c) {
      g->dq[size_t(c)] += ddot * load(p.k, p.dtype, b, h_kv, j, c);
      g->dk[size_t(j * p.dim + c)] += ddot * row.q[size_t(c)];
    }
    for (int64_t c = 0; c < p.dim_v; ++c) {
      g->dv[size_t(j * p.dim_v + c)] += row.prob[n] * dout[size_t(c)];
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

}  // namespace

void reference_backward(const BackwardCall& call) {
  const Problem& p = call.problem;
  Gradients g;
  size_bias_gradient(call, &g);
  Row row;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h_kv = 0; h_kv < p.heads_kv; ++h_kv) {
      g.dk.assign(size_t(p.seq_kv * p.dim), 0.0);
      g.dv.assign(size_t(p.seq_kv * p.dim_v), 0.0);
      for (int64_t h = h_kv * p.group(); h < (h_kv + 1) * p.group(); ++h) {
        for (int64_t i = 0; i < p.seq_q; ++i) {
          softmax_row(p, b, h, i, &row);
          backward_row(call, b, h, i, row, &g);
          for (int64_t c = 0; c < p.dim; ++c) store(call.dq, p.dtype, b, h, i, c, g.dq[size_t(c)]);
        }
      }
      for (int64_t j = 0; j < p.seq_kv; ++j) {
        for (int64_t c = 0; c < p.dim; ++c)
          store(call.dk, p.dtype, b, h_kv, j, c, g.dk[size_t(j * p.dim + c)]);
        for (int64_t c = 0; c < p.dim_v; ++c) {
          store(call.dv, p.dtype, b, h_kv, j, c, g.dv[size_t(j * p.dim_v + c)]);
        }
      }
    }
  }
  store_bias_gradient(call, g);
}

}  // namespace fae::cpu
