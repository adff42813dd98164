// Results of rows that no packed sequence has, on the host emulator: starts and bounds of lengths that
// validate() would refuse on a CPU are what a card cannot ask about.
#include <cmath>
#include <limits>
#include <vector>

#include "cuda_test.h"

namespace fae::testing {
namespace {

struct PackedCase {
  const char* name;
  std::vector<int32_t> starts;  // of queries, and of keys
  int64_t total, most;
};

const PackedCase kPackedCases[] = {
    {"bound too low", {0, 3, 50, 57}, 60, 5},    {"bound of zero", {0, 3, 7}, 7, 0},
    {"starts late", {4, 9, 12}, 12, 8},          {"decreasing", {6, 10, 2, 6}, 13, 9},
    {"decreasing below 0", {3, 9, -4, 2}, 8, 9}, {"past the end", {0, 4, 900, 12}, 12, 5},
};

// `packed` is read for as long as the case is.
Case packed_case(const PackedCase& packed, DType dtype) {
  CaseSpec s = shape("packed", int64_t(packed.starts.size()) - 1, 4, 2, packed.most, packed.most, 20, 12);
  s.dtype = dtype;
  // What a case has behind these, see Case::rows_q() and rows_kv(), makes up `total`.
  s.starts_q = {0, int32_t(packed.total - 2)};
  s.starts_kv = {0, int32_t(packed.total - 3)};
  Case c(s);
  c.problem.packing.starts_q = c.problem.packing.starts_kv = {packed.starts.data(), 1, false};
  return c;
}

// Whether a sequence has each row of a tensor.
std::vector<bool> owned_rows(const SequenceRows& rows, int64_t batch) {
  std::vector<bool> owned(size_t(rows.total));
  for (int64_t b = 0; b < batch; ++b) {
    const SequenceRows::Range range = rows.of(b);
    for (int64_t row = range.begin; row < range.end; ++row) owned[size_t(row)] = true;
  }
  return owned;
}

void expect_cleared(const HostTensor& x, const std::vector<bool>& owned, const char* name) {
  for (int64_t row = 0; row < x.shape()[2]; ++row) {
    for (int64_t h = 0; h < x.shape()[1]; ++h) {
      for (int64_t c = 0; c < x.shape()[3]; ++c) {
        const double got = x.get(0, h, row, c);
        ASSERT_TRUE(std::isfinite(got) && (owned[size_t(row)] || got == 0))
            << name << " is " << got << " in row " << row;
      }
    }
  }
}

FAE_CUDA_SUITE(CudaUnowned);

TEST_P(CudaUnowned, RowsOfNoSequenceAreCleared) {
  for (const PackedCase& packed : kPackedCases) {
    SCOPED_TRACE(packed.name);
    Case c = packed_case(packed, GetParam());
    EmulatedRun run;
    run.options.deterministic = true;
    const std::vector<bool> owned = owned_rows(c.problem.query_rows(), c.problem.batch);
    run_forward(c, run);
    expect_cleared(c.out, owned, "out");
    const std::vector<double> lse = c.lse_values();
    for (size_t i = 0; i < lse.size(); ++i) {
      if (!owned[i % owned.size()])
        ASSERT_EQ(lse[i], -std::numeric_limits<double>::infinity()) << "lse " << i;
    }
    if (packed.most == 0) continue;  // then there are no gradients to compute
    run_backward(c, run);
    expect_cleared(c.dq, owned, "dq");
    expect_cleared(c.dk, owned_rows(c.problem.key_rows(), c.problem.batch), "dk");
    expect_cleared(c.dv, owned_rows(c.problem.key_rows(), c.problem.batch), "dv");
  }
}

// More sequences than a block has threads.
TEST_P(CudaUnowned, ManySequences) {
  PackedCase packed{"many", {}, 0, 2};
  for (int b = 0; b <= 300; ++b) packed.starts.push_back(b + (b > 2 ? 1 : 0) + (b > 290 ? 3 : 0));
  packed.total = packed.starts.back() + 1;
  Case c = packed_case(packed, GetParam());
  run_forward(c, EmulatedRun());
  expect_cleared(c.out, owned_rows(c.problem.query_rows(), c.problem.batch), "out");
}

}  // namespace
}  // namespace fae::testing
