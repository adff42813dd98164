#include "attention_case.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <sstream>

#include "cpu/dispatch.h"
#include "cpu/reference.h"
#include "cpu/std_executor.h"

namespace fae::testing {
namespace {

struct Shape4 { int64_t n[4]; };

Shape4 extent_shape(Extent extent, const CaseSpec& s) {
  switch (extent) {
    case Extent::kFull: return {{s.batch, s.heads_q, s.seq_q, s.seq_kv}};
    case Extent::kPerHead: return {{1, s.heads_q, s.seq_q, s.seq_kv}};
    case Extent::kPerBatch: return {{s.batch, 1, 1, s.seq_kv}};
    case Extent::kRowOnly: return {{1, 1, s.seq_q, 1}};
    case Extent::kColumnOnly: return {{1, 1, 1, s.seq_kv}};
    default: return {{1, 1, 1, 1}};
  }
}

// Strides for broadcasting: 0 where the size is 1.
View4 broadcast(View4 view, const int64_t shape[4]) {
  for (int i = 0; i < 4; ++i) {
    if (shape[i] == 1) view.stride[i] = 0;
  }
  return view;
}

std::vector<double> lse_of(const std::optional<Guarded<std::byte>>& memory, DType t, int64_t count) {
  std::vector<double> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(load_as_double(memory->data(), t, i));
  return values;
}

}  // namespace

HostTensor::HostTensor(DType dtype, const int64_t shape[4], Layout layout, Strides strides) : dtype_(dtype) {
  std::copy(shape, shape + 4, shape_);
  // Axes from the innermost out.
  const int order_bshd[4] = {3, 1, 2, 0}, order_bhsd[4] = {3, 2, 1, 0};
  const int* order = layout == Layout::kBshd ? order_bshd : order_bhsd;
  int64_t step = strides == Strides::kColumnsApart ? 3 : 1;
  int64_t last = 0;
  bool empty = false;
  for (int i = 0; i < 4; ++i) {
    const int axis = order[i];
    view_.stride[axis] = step;
    if (strides == Strides::kBroadcastKv && (axis == 0 || axis == 1)) view_.stride[axis] = 0;
    else step = step * shape[axis] + (strides == Strides::kRowsApart && i == 0 ? 5 : 0);
    empty |= shape[axis] == 0;
    last += (shape[axis] - 1) * view_.stride[axis];
  }
  memory_.emplace(size_t(empty ? 0 : (last + 1) * size_of(dtype)));
  view_.data = memory_->data();
}

double HostTensor::get(int64_t b, int64_t h, int64_t r, int64_t c) const {
  return load_as_double(view_.data, dtype_, view_.offset(b, h, r) + c * view_.stride[3]);
}
void HostTensor::set(int64_t b, int64_t h, int64_t r, int64_t c, double x) {
  store_from_double(view_.data, dtype_, view_.offset(b, h, r) + c * view_.stride[3], x);
}

namespace {
template <class Fn>
void for_each_index(const int64_t shape[4], Fn&& fn) {
  for (int64_t b = 0; b < shape[0]; ++b) {
    for (int64_t h = 0; h < shape[1]; ++h) {
      for (int64_t r = 0; r < shape[2]; ++r) {
        for (int64_t c = 0; c < shape[3]; ++c) fn(b, h, r, c);
      }
    }
  }
}
}  // namespace

std::vector<double> HostTensor::values() const {
  std::vector<double> all;
  for_each_index(shape_, [&](int64_t b, int64_t h, int64_t r, int64_t c) { all.push_back(get(b, h, r, c)); });
  return all;
}
void HostTensor::fill_normal(uint32_t seed, double deviation) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0, deviation);
  for_each_index(shape_,
                 [&](int64_t b, int64_t h, int64_t r, int64_t c) { set(b, h, r, c, normal(random)); });
}
void HostTensor::fill(double x) {
  for_each_index(shape_, [&](int64_t b, int64_t h, int64_t r, int64_t c) { set(b, h, r, c, x); });
}

Case::Case(const CaseSpec& s, uint32_t seed) : spec(s) {
  const Strides plain = s.strides == Strides::kBroadcastKv ? Strides::kContiguous : s.strides;
  const auto tensor = [&](int64_t heads, int64_t rows, int64_t columns, Strides strides) {
    const int64_t shape[4] = {packed() ? 1 : s.batch, heads, rows, columns};
    return HostTensor(s.dtype, shape, s.layout, strides);
  };
  q = tensor(s.heads_q, rows_q(), s.dim, plain);
  k = tensor(s.heads_kv, rows_kv(), s.dim, s.strides);
  v = tensor(s.heads_kv, rows_kv(), s.dim_v, s.strides);
  out = tensor(s.heads_q, rows_q(), s.dim_v, plain);
  dout = tensor(s.heads_q, rows_q(), s.dim_v, plain);
  dq = tensor(s.heads_q, rows_q(), s.dim, plain);
  dk = tensor(s.heads_kv, rows_kv(), s.dim, plain);
  dv = tensor(s.heads_kv, rows_kv(), s.dim_v, plain);
  q.fill_normal(seed);
  k.fill_normal(seed + 1);
  v.fill_normal(seed + 2);
  dout.fill_normal(seed + 3);

  Problem& p = problem;
  p.dtype = s.dtype;
  p.batch = s.batch;
  p.heads_q = s.heads_q;
  p.heads_kv = s.heads_kv;
  p.seq_q = s.seq_q;
  p.seq_kv = s.seq_kv;
  p.dim = s.dim;
  p.dim_v = s.dim_v;
  p.q = one_batch(q);
  p.k = one_batch(k);
  p.v = one_batch(v);
  p.band_rule = {s.causal, s.window_left, s.window_right};
  p.masking.band = p.band_rule.of(s.seq_q, s.seq_kv);
  p.score.scale = s.scale ? *s.scale : 1 / std::sqrt(double(s.dim));
  p.score.softcap = s.softcap;

  std::mt19937 random(seed + 4);
  std::uniform_real_distribution<double> uniform(0, 1);
  if (s.mask != Extent::kNone) {
    CaseSpec blocks = s;
    blocks.seq_q = (s.seq_q + s.mask_block_q - 1) / s.mask_block_q;
    blocks.seq_kv = (s.seq_kv + s.mask_block_kv - 1) / s.mask_block_kv;
    const Shape4 shape = extent_shape(s.mask, blocks);
    mask.emplace(size_t(shape.n[0] * shape.n[1] * shape.n[2] * shape.n[3]));
    for (uint8_t& x : *mask) x = uniform(random) < s.mask_visible;
    View4 view{mask->data(), {shape.n[1] * shape.n[2] * shape.n[3], shape.n[2] * shape.n[3], shape.n[3], 1}};
    p.masking.mask = {broadcast(view, shape.n), s.mask_block_q, s.mask_block_kv};
  }
  if (s.bias != Extent::kNone) {
    const Shape4 shape = extent_shape(s.bias, s);
    bias = HostTensor(s.bias_dtype, shape.n, Layout::kBhsd, plain);
    bias.fill_normal(seed + 5);
    for_each_index(shape.n, [&](int64_t b, int64_t h, int64_t r, int64_t c) {
      if (uniform(random) < s.bias_hidden) bias.set(b, h, r, c, -INFINITY);
    });
    p.score.bias = broadcast(bias.view(), shape.n);
    p.score.bias_dtype = s.bias_dtype;
    dbias = HostTensor(s.bias_dtype, shape.n, Layout::kBhsd, Strides::kContiguous);
  }
  if (!s.kv_lengths.empty()) {
    if (s.int32_lengths) {
      lengths32.emplace(s.kv_lengths.size());
      std::copy(s.kv_lengths.begin(), s.kv_lengths.end(), lengths32->begin());
      p.masking.kv_lengths = {lengths32->data(), 1, false};
    } else {
      lengths64.emplace(s.kv_lengths.size());
      std::copy(s.kv_lengths.begin(), s.kv_lengths.end(), lengths64->begin());
      p.masking.kv_lengths = {lengths64->data(), 1, true};
    }
  }
  add_extras(seed);
  lse.emplace(size_t(lse_count() * size_of(lse_dtype())));
  if (s.dlse) {
    dlse.emplace(size_t(lse_count() * size_of(lse_dtype())));
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < lse_count(); ++i) store_from_double(dlse->data(), lse_dtype(), i, normal(random));
  }
  clear_results();
}

// Everything that only extended calls have.
void Case::add_extras(uint32_t seed) {
  const CaseSpec& s = spec;
  Problem& p = problem;
  std::mt19937 random(seed + 6);
  const DType own = s.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const auto per_head = [&](HostTensor* t, HostTensor* gradient, bool per_batch) {
    const int64_t shape[4] = {per_batch ? s.batch : 1, s.heads_q, 1, 1};
    *t = HostTensor(own, shape, Layout::kBhsd, Strides::kContiguous);
    *gradient = HostTensor(own, shape, Layout::kBhsd, Strides::kContiguous);
    return head_values(*t);
  };
  if (s.alibi) {
    p.score.alibi = per_head(&slopes, &dalibi, s.alibi_per_batch);
    // Scores of a size that fp32 holds well.
    slopes.fill_normal(seed + 7, std::min(0.2, 16.0 / double(s.seq_kv)));
  }
  if (s.sinks) {
    p.score.sinks = per_head(&sinks, &dsinks, false);
    sinks.fill_normal(seed + 8);
  }
  if (s.dropout_p > 0) p.dropout = make_dropout(s.dropout_p, rng_state, 1);
  // Queries of few kinds, keys that end at about their own place or begin before it.
  if (s.intervals > 0) {
    for (int64_t n = s.intervals * s.batch * s.seq_q; n > 0; --n)
      labels.push_back(int32_t(n * 7 / (s.seq_q + 1) % 5));
    for (int64_t n = s.intervals * s.batch * s.seq_kv; n > 0; --n) {
      const int32_t low = int32_t(random() % 3);
      bounds.push_back(low);
      bounds.push_back(low + int32_t(random() % 4));
    }
    Intervals& x = p.masking.intervals;
    x = {labels.data(),
         bounds.data(),
         {s.batch * s.seq_q, s.seq_q, 1},
         {s.batch * s.seq_kv * 2, s.seq_kv * 2, 2, 1},
         s.intervals};
  }
  if (packed()) {
    p.packing = {{spec.starts_q.data(), 1, false}, {spec.starts_kv.data(), 1, false}, rows_q(), rows_kv()};
  }
}

PerHead Case::head_values(const HostTensor& t) {
  const View4 view = t.view();
  return {view.data, t.dtype(), {t.shape()[0] == 1 ? 0 : view.stride[0], view.stride[1]}};
}

View4 Case::one_batch(const HostTensor& t) const {
  View4 view = t.view();
  if (packed()) view.stride[0] = 0;
  return view;
}

template <class Void>
RowValues<Void> Case::rows_of(void* data) const {
  return {data, packed() ? 0 : spec.heads_q * spec.seq_q, rows_q()};
}

void Case::clear_results() {
  for (HostTensor* t : {&out, &dq, &dk, &dv, &dbias, &dalibi, &dsinks}) t->fill(std::nan(""));
  if (lse->size()) memset(lse->data(), 0xff, lse->size());
}

std::vector<double> Case::lse_values() const { return lse_of(lse, lse_dtype(), lse_count()); }

ForwardCall Case::forward_call() { return {problem, one_batch(out), rows_of<void>(lse->data())}; }

BackwardCall Case::backward_call() {
  BackwardCall call;
  call.problem = problem;
  call.out = one_batch(out);
  call.dout = one_batch(dout);
  call.lse = rows_of<const void>(lse->data());
  call.lse_count = lse_count();
  if (dlse) call.dlse = rows_of<const void>(dlse->data());
  call.dq = one_batch(dq);
  call.dk = one_batch(dk);
  call.dv = one_batch(dv);
  if (spec.alibi) call.dalibi = head_values(dalibi);
  if (spec.sinks) call.dsinks = head_values(dsinks);
  if (spec.bias != Extent::kNone) {
    call.dbias = broadcast(dbias.view(), dbias.shape());
    std::copy(dbias.shape(), dbias.shape() + 4, call.dbias_shape);
  }
  return call;
}

ForwardResult run_forward(Case& c, cpu::Isa isa, int threads, int64_t block_q) {
  const ForwardCall call = c.forward_call();
  cpu::Plan plan = cpu::plan_forward(c.problem, isa, threads);
  if (block_q > 0 && plan.tasks > 0) {
    plan.block_q = block_q;
    plan.tasks = c.problem.batch * c.problem.heads_kv * ((c.problem.packed_rows() + block_q - 1) / block_q);
    plan.worker_bytes = cpu::kernels_for(isa, c.problem.dtype).forward.workspace(call, plan);
  }
  c.clear_results();
  cpu::forward(call, plan, cpu::std_executor(threads));
  return {c.out.values(), c.lse_values()};
}

BackwardResult run_backward(Case& c, cpu::Isa isa, int threads) {
  run_forward(c, isa, threads);
  for (HostTensor* t : {&c.dq, &c.dk, &c.dv, &c.dbias, &c.dalibi, &c.dsinks}) t->fill(std::nan(""));
  const BackwardCall call = c.backward_call();
  cpu::backward(call, cpu::plan_backward(c.problem, isa, threads), cpu::std_executor(threads));
  return {c.dq.values(),    c.dk.values(),     c.dv.values(),
          c.dbias.values(), c.dalibi.values(), c.dsinks.values()};
}

namespace {

// The same numbers in float64.
Case widened(const Case& c) {
  CaseSpec spec = c.spec;
  spec.dtype = spec.bias_dtype = DType::kFloat64;
  Case wide(spec);
  const auto copy = [](const HostTensor& from, HostTensor* to) {
    for_each_index(from.shape(), [&](int64_t b, int64_t h, int64_t r, int64_t x) {
      to->set(b, h, r, x, from.get(b, h, r, x));
    });
  };
  copy(c.q, &wide.q);
  copy(c.k, &wide.k);
  copy(c.v, &wide.v);
  copy(c.dout, &wide.dout);
  copy(c.bias, &wide.bias);
  copy(c.slopes, &wide.slopes);
  copy(c.sinks, &wide.sinks);
  wide.problem.masking = c.problem.masking;
  wide.problem.dropout = c.problem.dropout;
  for (int64_t i = 0; c.dlse && i < c.lse_count(); ++i) {
    store_from_double(wide.dlse->data(), DType::kFloat64, i,
                      load_as_double(c.dlse->data(), c.lse_dtype(), i));
  }
  return wide;
}

}  // namespace

ForwardResult exact_forward(Case& c) {
  Case wide = widened(c);
  cpu::reference_forward(wide.forward_call());
  return {wide.out.values(), wide.lse_values()};
}

BackwardResult exact_backward(Case& c) {
  Case wide = widened(c);
  cpu::reference_backward(wide.backward_call());
  return {wide.dq.values(),    wide.dk.values(),     wide.dv.values(),
          wide.dbias.values(), wide.dalibi.values(), wide.dsinks.values()};
}

bool identical(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) ? !std::isnan(b[i]) : a[i] != b[i] || std::signbit(a[i]) != std::signbit(b[i]))
      return false;
  }
  return true;
}

std::string mismatch(const std::vector<double>& got, const std::vector<double>& wanted, double tolerance) {
  std::ostringstream text;
  if (got.size() != wanted.size()) return "another number of elements";
  double largest = 0.1, worst = 0;
  for (double x : wanted) {
    if (std::isfinite(x)) largest = std::max(largest, 0.1 + std::fabs(x));
  }
  size_t at = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const bool same = std::isnan(wanted[i]) ? std::isnan(got[i]) : got[i] == wanted[i];
    double error = same ? 0 : std::fabs(got[i] - wanted[i]) / largest;
    if (!std::isfinite(error)) error = INFINITY;
    if (error > worst) worst = error, at = i;
  }
  if (worst <= tolerance) return "";
  text << "element " << at << " of " << got.size() << " is " << got[at] << " and must be " << wanted[at]
       << ": error " << worst << " of the largest, allowed " << tolerance;
  return text.str();
}

}  // namespace fae::testing
