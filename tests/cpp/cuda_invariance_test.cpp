// What must not change a bit of the CUDA kernels' results, on the host emulator.
#include <cstring>

#include "cuda/emu/launch.h"
#include "cuda_test.h"

namespace fae::testing {
namespace {

View4 moved(View4 view, DType dtype, int64_t elements) {
  view.data = static_cast<std::byte*>(view.data) + elements * size_of(dtype);
  return view;
}

FAE_CUDA_SUITE(CudaInvariance);

TEST_P(CudaInvariance, LseIsOptional) {
  Case c(case_named("group_3", GetParam()));
  const ForwardResult with = run_forward(c, EmulatedRun());
  c.clear_results();
  ForwardCall call = c.forward_call();
  call.lse = {};
  launch_forward(c, call, 0, {});
  EXPECT_TRUE(identical(c.out.values(), with.out));
}

TEST_P(CudaInvariance, ForwardDoesNotDependOnTheSchedule) {
  CaseSpec spec = case_named("window_causal", GetParam());
  spec.mask = Extent::kFull;
  Case c(spec);
  const ForwardResult first = run_forward(c, EmulatedRun());
  for (uint64_t seed = 1; seed < 6; ++seed) {
    EmulatedRun run;
    run.seed = seed;
    const ForwardResult other = run_forward(c, run);
    EXPECT_TRUE(identical(other.out, first.out)) << seed;
    EXPECT_TRUE(identical(other.lse, first.lse)) << seed;
  }
}

// A row's result has the same bits whichever rows share its block: the queries [begin, end)
// of every head alone, under the band that they had.
TEST_P(CudaInvariance, ForwardDoesNotDependOnOtherRows) {
  for (const char* name : {"plain", "causal", "window", "modified", "wide", "split"}) {
    const bool wide = !std::strcmp(name, "wide"), split = !std::strcmp(name, "split");
    const int64_t dim = split ? 264 : wide ? 128 : 40;
    CaseSpec spec = shape(name, 1, 4, 2, 100, 150, dim, dim);
    spec.dtype = GetParam();
    if (!std::strcmp(name, "causal")) spec.causal = Causal::kBottomRight;
    if (!std::strcmp(name, "window")) spec.window_left = 70, spec.window_right = 5;
    if (!std::strcmp(name, "modified")) spec.softcap = 2, spec.causal = Causal::kTopLeft;
    if (split) spec.heads_q = 2, spec.seq_q = 40;
    Case c(spec);
    const ForwardResult whole = run_forward(c, EmulatedRun());
    c.clear_results();
    const int64_t cuts[] = {0, 1, 34, spec.seq_q};
    for (int part = 0; part < 3; ++part) {
      const int64_t begin = cuts[part], rows = cuts[part + 1] - begin;
      ForwardCall call = c.forward_call();
      call.problem.seq_q = rows;
      call.problem.q = moved(c.q.view(), spec.dtype, begin * c.q.view().stride[2]);
      call.out = moved(c.out.view(), spec.dtype, begin * c.out.view().stride[2]);
      Band& band = call.problem.masking.band;
      band.lo += begin;
      band.hi += begin;
      std::vector<double> lse(size_t(spec.heads_q * rows));
      call.lse = {lse.data(), spec.heads_q * rows, rows};
      launch_forward(c, call, lse.size() * size_t(size_of(c.lse_dtype())), {});
      for (int64_t h = 0; h < spec.heads_q; ++h) {
        for (int64_t i = 0; i < rows; ++i) {
          const double got = load_as_double(lse.data(), c.lse_dtype(), h * rows + i);
          ASSERT_EQ(got, whole.lse[size_t(h * spec.seq_q + begin + i)]) << name << " row " << begin + i;
        }
      }
    }
    EXPECT_TRUE(identical(c.out.values(), whole.out)) << name;
  }
}

// One element of a batch alone, one K/V head alone: forward and ordered backward.
TEST_P(CudaInvariance, NothingDependsOnTheBatch) {
  CaseSpec spec = shape("", 3, 4, 2, 45, 75, 64, 64);
  spec.dtype = GetParam();
  spec.causal = Causal::kBottomRight;
  EmulatedRun run;
  run.options.deterministic = true;
  Case c(spec);
  const BackwardResult whole = run_backward(c, run);
  const auto out = c.out.values(), lse = c.lse_values();
  CaseSpec one = spec;
  one.batch = one.heads_kv = 1;
  one.heads_q = 2;
  Case alone(one);
  const auto copy = [](const HostTensor& from, HostTensor& to, int64_t b, int64_t head) {
    const int64_t* n = to.shape();
    for (int64_t h = 0; h < n[1]; ++h) {
      for (int64_t r = 0; r < n[2]; ++r) {
        for (int64_t x = 0; x < n[3]; ++x) to.set(0, h, r, x, from.get(b, head + h, r, x));
      }
    }
  };
  // Head `head` of batch b in a result of `heads` heads, `count` heads of `size` elements.
  const auto part = [](const std::vector<double>& all, int64_t heads, int64_t b, int64_t head, int64_t count,
                       int64_t size) {
    const auto at = all.begin() + (b * heads + head) * size;
    return std::vector<double>(at, at + count * size);
  };
  for (int64_t b : {0, 2}) {
    for (int64_t head : {0, 1}) {
      SCOPED_TRACE(std::to_string(b) + " " + std::to_string(head));
      copy(c.q, alone.q, b, 2 * head);
      copy(c.dout, alone.dout, b, 2 * head);
      copy(c.k, alone.k, b, head);
      copy(c.v, alone.v, b, head);
      const BackwardResult got = run_backward(alone, run);
      EXPECT_TRUE(identical(alone.out.values(), part(out, 4, b, 2 * head, 2, 45 * 64)));
      EXPECT_TRUE(identical(alone.lse_values(), part(lse, 4, b, 2 * head, 2, 45)));
      EXPECT_TRUE(identical(got.dq, part(whole.dq, 4, b, 2 * head, 2, 45 * 64)));
      EXPECT_TRUE(identical(got.dk, part(whole.dk, 2, b, head, 1, 75 * 64)));
      EXPECT_TRUE(identical(got.dv, part(whole.dv, 2, b, head, 1, 75 * 64)));
    }
  }
}

// Without atomics every gradient has the same bits under every schedule; with them dQ is the
// only one that may differ, by the rounding of its sums.
TEST_P(CudaInvariance, BackwardAndTheSchedule) {
  for (const char* name : {"window_causal", "bias_per_batch"}) {
    SCOPED_TRACE(name);
    CaseSpec spec = case_named(name, GetParam());
    spec.seq_kv = 300;  // several blocks of keys add to a row of dQ
    Case c(spec);
    EmulatedRun run;
    run.options.deterministic = true;
    const BackwardResult ordered = run_backward(c, run);
    bool differs = false;
    for (uint64_t seed = 1; seed < 3; ++seed) {
      run.seed = seed;
      run.options.deterministic = true;
      EXPECT_TRUE(identical_all(run_backward(c, run), ordered)) << seed;
      run.options.deterministic = false;
      const BackwardResult atomic = run_backward(c, run);
      EXPECT_TRUE(identical(atomic.dk, ordered.dk) && identical(atomic.dv, ordered.dv) &&
                  identical(atomic.dbias, ordered.dbias))
          << seed;
      EXPECT_EQ(mismatch(atomic.dq, ordered.dq, backward_tolerance(GetParam())), "") << seed;
      differs |= !identical(atomic.dq, ordered.dq);
    }
    // Else the comparison above would have said nothing about another order of sums.
    EXPECT_TRUE(differs || spec.dtype != DType::kFloat32);
  }
}

// How the tensors of a problem lie in memory: columns of wider rows, the first `shift` elements
// after a multiple of 16 bytes.
struct Placement {
  const char* name;
  Layout layout = Layout::kBshd;
  Strides strides = Strides::kContiguous;
  int64_t wider = 0;
  int64_t shift = 0;
  bool vector = true;  // rows can be moved 16 bytes at a time
};
constexpr Placement kPlacements[] = {
    {"bshd"},
    {"bhsd", Layout::kBhsd},
    {"columns of wider rows", Layout::kBshd, Strides::kContiguous, 16},
    {"columns of wider rows, shifted", Layout::kBhsd, Strides::kContiguous, 16, 8},
    {"one element off", Layout::kBshd, Strides::kContiguous, 16, 1, false},
    {"one element off, heads first", Layout::kBhsd, Strides::kContiguous, 16, 1, false},
    {"odd rows", Layout::kBshd, Strides::kContiguous, 3, 0, false},
    {"rows apart", Layout::kBhsd, Strides::kRowsApart, 0, 0, false},
    {"columns apart", Layout::kBshd, Strides::kColumnsApart, 0, 0, false},
    {"columns apart, one element off", Layout::kBhsd, Strides::kColumnsApart, 4, 1, false},
};

// A tensor of a case, placed otherwise.
struct Placed {
  HostTensor memory;
  View4 view;
  int64_t shape[4];

  Placed(const HostTensor& from, const Placement& at) {
    std::copy(from.shape(), from.shape() + 4, shape);
    int64_t wide[4] = {shape[0], shape[1], shape[2], shape[3] + at.wider};
    memory = HostTensor(from.dtype(), wide, at.layout, at.strides);
    memory.fill(7);
    view = moved(memory.view(), from.dtype(), at.shift * memory.view().stride[3]);
    for_each(from, [&](int64_t i, double x) { store_from_double(view.data, from.dtype(), i, x); });
  }
  std::vector<double> values() const {
    std::vector<double> all;
    for_each(memory, [&](int64_t i, double) { all.push_back(load_as_double(view.data, memory.dtype(), i)); });
    return all;
  }
  // What lies beside the view is as it was.
  bool is_clean(const Placement& at) const {
    bool clean = true;
    for (int64_t b = 0; b < shape[0]; ++b) {
      for (int64_t h = 0; h < shape[1]; ++h) {
        for (int64_t r = 0; r < shape[2]; ++r) {
          for (int64_t x = 0; x < shape[3] + at.wider; ++x) {
            if (x < at.shift || x >= at.shift + shape[3]) clean &= memory.get(b, h, r, x) == 7;
          }
        }
      }
    }
    return clean;
  }

 private:
  // fn(element offset in the view, element of `from`)
  template <class Fn>
  void for_each(const HostTensor& from, Fn&& fn) const {
    for (int64_t b = 0; b < shape[0]; ++b) {
      for (int64_t h = 0; h < shape[1]; ++h) {
        for (int64_t r = 0; r < shape[2]; ++r) {
          for (int64_t x = 0; x < shape[3]; ++x)
            fn(view.offset(b, h, r) + x * view.stride[3], from.get(b, h, r, x));
        }
      }
    }
  }
};

FAE_CUDA_SUITE(CudaPlacement);

// Bits do not depend on where and how tensors lie, be it 16 bytes or an element at a time.
TEST_P(CudaPlacement, ChangesNothing) {
  CaseSpec spec = shape("", 2, 4, 2, 40, 70, 64, 64);
  spec.dtype = GetParam();
  spec.causal = Causal::kBottomRight;
  EmulatedRun run;
  run.options.deterministic = true;
  Case c(spec);
  const BackwardResult wanted = run_backward(c, run);
  const auto out = c.out.values();
  for (const Placement& at : kPlacements) {
    SCOPED_TRACE(at.name);
    Placed q(c.q, at), k(c.k, at), v(c.v, at), o(c.out, at), dout(c.dout, at), dq(c.q, at), dk(c.k, at),
        dv(c.v, at);
    namespace emu = cuda::emu;
    std::vector<emu::ScopedRange> ranges;
    for (Placed* x : {&q, &k, &v, &o, &dout, &dq, &dk, &dv}) {
      ranges.emplace_back((const void*)x->memory.bytes(), x->memory.byte_count(), "tensor",
                          emu::Access::kReadWrite);
    }
    ForwardCall call = c.forward_call();
    call.problem.q = q.view, call.problem.k = k.view, call.problem.v = v.view, call.out = o.view;
    emu::reset_counters();
    launch_forward(c, call, c.lse->size(), run);
    EXPECT_EQ(emu::instructions().copy_async > 0, at.vector);
    EXPECT_TRUE(identical(o.values(), out));
    BackwardCall back = c.backward_call();
    back.problem = call.problem;
    back.out = o.view, back.dout = dout.view, back.dq = dq.view, back.dk = dk.view, back.dv = dv.view;
    emu::reset_counters();
    launch_backward(c, back, run);
    EXPECT_EQ(emu::instructions().copy_async > 0, at.vector);
    EXPECT_TRUE(identical(dq.values(), wanted.dq));
    EXPECT_TRUE(identical(dk.values(), wanted.dk));
    EXPECT_TRUE(identical(dv.values(), wanted.dv));
    for (const Placed* x : {&o, &dq, &dk, &dv}) EXPECT_TRUE(x->is_clean(at));
  }
}

// One K/V head for all by strides of 0, as tensors of their own.
TEST_P(CudaPlacement, BroadcastKeysAndValues) {
  CaseSpec spec = shape("", 2, 4, 2, 40, 70, 64, 64);
  spec.dtype = GetParam();
  spec.strides = Strides::kBroadcastKv;
  Case shared(spec);
  spec.strides = Strides::kContiguous;
  Case own(spec);
  for (auto [from, to] : {std::pair(&shared.k, &own.k), std::pair(&shared.v, &own.v)}) {
    const int64_t* n = to->shape();
    for (int64_t b = 0; b < n[0]; ++b) {
      for (int64_t h = 0; h < n[1]; ++h) {
        for (int64_t r = 0; r < n[2]; ++r) {
          for (int64_t x = 0; x < n[3]; ++x) to->set(b, h, r, x, from->get(b, h, r, x));
        }
      }
    }
  }
  EmulatedRun run;
  run.options.deterministic = true;
  cuda::emu::reset_counters();
  EXPECT_TRUE(identical_all(run_backward(shared, run), run_backward(own, run)));
  EXPECT_TRUE(identical(shared.out.values(), own.out.values()));
  EXPECT_GT(cuda::emu::instructions().copy_async, 0u);
}

}  // namespace
}  // namespace fae::testing
