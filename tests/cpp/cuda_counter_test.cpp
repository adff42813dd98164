// What the CUDA kernels cost: bank conflicts, memory sectors and instructions, on the host emulator.
#include <algorithm>

#include "cuda/emu/launch.h"
#include "cuda_test.h"

namespace fae::testing {
namespace {

namespace emu = cuda::emu;

struct Counted {
  emu::Instructions instructions;
  std::vector<emu::AccessSite> sites;
};

enum class Pass { kForward, kAtomic, kOrdered };

EmulatedRun run_of(Pass pass, bool sites) {
  EmulatedRun run;
  run.count = sites;
  run.options.deterministic = pass == Pass::kOrdered;
  run.device.shared_bytes = 163 * 1024;  // every kernel, also those that small cards have no room for
  return run;
}

// Counts one pass of a case alone.
Counted count(Case& c, Pass pass, bool sites = false) {
  const EmulatedRun run = run_of(pass, sites);
  if (pass != Pass::kForward) run_forward(c, run_of(Pass::kForward, false));
  emu::reset_counters();
  if (pass == Pass::kForward) run_forward(c, run);
  else launch_backward(c, c.backward_call(), run);
  return {emu::instructions(), emu::access_sites()};
}

// Rows and keys are no multiples of tiles, rows of tensors are whole sectors.
CaseSpec contiguous(DType dtype, int64_t dim) {
  CaseSpec s = shape("", 1, 2, 2, 72, 136, dim, dim);
  s.dtype = dtype;
  s.causal = Causal::kBottomRight;
  return s;
}
constexpr Pass kPasses[] = {Pass::kForward, Pass::kAtomic, Pass::kOrdered};
// A head dim for every tile size, and one that is cut into slices.
std::vector<int64_t> dims(DType dtype) {
  if (dtype == DType::kFloat32) return {64, 128, 272};
  return {64, 96, 128, 256, 272};
}

std::string text(const emu::AccessSite& s) {
  return s.file + ":" + std::to_string(s.line) + " " + s.op + ": " + std::to_string(s.accesses) +
         " accesses, " + std::to_string(s.extra_wavefronts) + " extra passes, " + std::to_string(s.sectors) +
         " sectors for " + std::to_string(s.ideal_sectors);
}

FAE_CUDA_SUITE(CudaMemoryAccess);

TEST_P(CudaMemoryAccess, NoBankConflictsAndWholeSectors) {
  for (int64_t dim : dims(GetParam())) {
    for (Pass pass : kPasses) {
      if (pass == Pass::kOrdered && dim > 128) continue;  // the only way there is, for slices
      Case c(contiguous(GetParam(), dim));
      int matrices = 0, global = 0;
      for (const emu::AccessSite& s : count(c, pass, true).sites) {
        matrices += s.op == "ldmatrix_x4";
        global += s.ideal_sectors > 0;
        EXPECT_EQ(s.extra_wavefronts, 0u) << dim << ' ' << text(s);
        // The sums of dQ take every other element of a row with each addition.
        const bool sums = s.op == "add_global";
        EXPECT_EQ(s.sectors, sums ? 2 * s.ideal_sectors : s.ideal_sectors) << dim << ' ' << text(s);
      }
      EXPECT_GT(matrices, 0);
      EXPECT_GT(global, 2);
    }
  }
}

TEST_P(CudaMemoryAccess, NoBankConflictsElementByElement) {
  Case c(contiguous(GetParam(), 67));
  for (Pass pass : kPasses) {
    int seen = 0;
    for (const emu::AccessSite& s : count(c, pass, true).sites) {
      if (s.file != "csrc/cuda/tile/gmem_tile.h" || s.op != "store_shared") continue;
      EXPECT_EQ(s.extra_wavefronts, 0u) << text(s);
      ++seen;
    }
    EXPECT_GT(seen, 0);
  }
}

// Tiles of `rows` packed query rows x `keys` keys with at least one visible pair, of each K/V head.
struct Tiles {
  int64_t row_tiles = 0;  // with a visible key
  int64_t key_tiles = 0;  // with a query that sees a key
  int64_t pairs = 0;
};
Tiles visible_tiles(const Case& c, int64_t rows, int64_t keys) {
  const Problem& p = c.problem;
  Tiles tiles;
  const int64_t group = p.group(), key_tiles = (p.seq_kv + keys - 1) / keys;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t h = 0; h < p.heads_kv; ++h) {
      std::vector<bool> key_seen(size_t(key_tiles), false);
      for (int64_t row = 0; row < p.packed_rows(); row += rows) {
        bool row_sees = false;
        for (int64_t k = 0; k < key_tiles; ++k) {
          bool seen = false;
          for (int64_t r = row; r < std::min(row + rows, p.packed_rows()) && !seen; ++r) {
            for (int64_t j = k * keys; j < std::min((k + 1) * keys, p.seq_kv) && !seen; ++j) {
              seen = is_visible(p, p.sequence(b), b, h * group + r % group, r / group, j);
            }
          }
          tiles.pairs += seen;
          row_sees = row_sees || seen;
          if (seen) key_seen[size_t(k)] = true;
        }
        tiles.row_tiles += row_sees;
      }
      tiles.key_tiles += std::count(key_seen.begin(), key_seen.end(), true);
    }
  }
  return tiles;
}

std::vector<CaseSpec> sparse_specs(DType dtype) {
  std::vector<CaseSpec> specs;
  const auto add = [&](CaseSpec s, Causal causal, int64_t left, int64_t right) {
    s.dtype = dtype;
    s.causal = causal;
    s.window_left = left;
    s.window_right = right;
    specs.push_back(s);
  };
  add(shape("full", 1, 2, 2, 130, 140, 64, 64), Causal::kNone, -1, -1);
  add(shape("causal", 1, 2, 1, 300, 300, 64, 64), Causal::kBottomRight, -1, -1);
  add(shape("causal_tall", 1, 1, 1, 300, 100, 64, 64), Causal::kBottomRight, -1, -1);
  add(shape("top_left", 1, 1, 1, 150, 400, 64, 64), Causal::kTopLeft, -1, -1);
  add(shape("window", 1, 1, 1, 400, 400, 64, 64), Causal::kNone, 30, 10);
  add(shape("window_causal", 1, 2, 1, 300, 300, 64, 64), Causal::kBottomRight, 50, -1);
  add(shape("lengths", 3, 1, 1, 140, 300, 64, 64), Causal::kNone, -1, -1);
  specs.back().kv_lengths = {0, 65, 300};
  return specs;
}

FAE_CUDA_SUITE(CudaWork);

// Matrix instructions for `pairs` tiles of a x b x depth elements.
uint64_t products(const Case& c, int64_t pairs, int64_t a, int64_t b, int64_t depth) {
  const bool fp32 = c.spec.dtype == DType::kFloat32;  // three products, half as deep each
  return uint64_t(pairs * (a / 16) * (b / 8) * (depth / (fp32 ? 8 : 16)) * (fp32 ? 3 : 1));
}

// A tile that nobody sees costs neither a matrix instruction nor a copy.
TEST_P(CudaWork, ForwardDoesVisibleTilesAlone) {
  for (const CaseSpec& spec : sparse_specs(GetParam())) {
    SCOPED_TRACE(spec.name);
    Case c(spec);
    const cuda::Variant& v = *cuda::plan_forward(c.problem, {}, {}).forward.variant;
    ASSERT_EQ(v.dim, 64);
    const Tiles tiles = visible_tiles(c, v.tile_q, v.tile_kv);
    const Counted n = count(c, Pass::kForward);
    EXPECT_EQ(n.instructions.mma, 2 * products(c, tiles.pairs, v.tile_q, v.tile_kv, 64));
    const int64_t chunks = 64 * size_of(GetParam()) / 16;
    EXPECT_EQ(n.instructions.copy_async,
              uint64_t(chunks * (tiles.row_tiles * v.tile_q + tiles.pairs * 2 * v.tile_kv)));
    EXPECT_EQ(n.instructions.load_global, 0u);  // no mask, no bias: nothing is read element by element
  }
}

TEST_P(CudaWork, BackwardDoesVisibleTilesAlone) {
  for (const CaseSpec& spec : sparse_specs(GetParam())) {
    for (Pass pass : {Pass::kAtomic, Pass::kOrdered}) {
      SCOPED_TRACE(spec.name + (pass == Pass::kOrdered ? " ordered" : ""));
      Case c(spec);
      const EmulatedRun run = run_of(pass, false);
      const cuda::Plan plan = cuda::plan_backward(c.problem, run.device, run.options);
      const cuda::Variant& v = *plan.key_grad.variant;
      ASSERT_EQ(v.dim, 64);
      const Tiles tiles = visible_tiles(c, v.tile_q, v.tile_kv);
      const uint64_t product = products(c, tiles.pairs, v.tile_q, v.tile_kv, 64);
      const int64_t chunks = 64 * size_of(GetParam()) / 16;
      const int64_t key_blocks = (spec.seq_kv + v.tile_kv - 1) / v.tile_kv * spec.batch * spec.heads_kv;
      uint64_t mma = 4 * product,
               copies = uint64_t(chunks * 2 * (key_blocks * v.tile_kv + tiles.pairs * v.tile_q));
      if (pass == Pass::kAtomic) {
        mma += product;
      } else {
        const cuda::Variant& w = *plan.query_grad.variant;
        const Tiles others = visible_tiles(c, w.tile_q, w.tile_kv);
        mma += 3 * products(c, others.pairs, w.tile_q, w.tile_kv, 64);
        copies += uint64_t(chunks * 2 * (others.row_tiles * w.tile_q + others.pairs * w.tile_kv));
      }
      const Counted n = count(c, pass);
      EXPECT_EQ(n.instructions.mma, mma);
      EXPECT_EQ(n.instructions.copy_async, copies);
    }
  }
}

// Query heads that share keys share their loads: as many rows of one head cost the same, heads
// with keys of their own cost a multiple.
TEST_P(CudaWork, GroupsLoadKeysOnce) {
  const auto copies = [&](int64_t heads_q, int64_t heads_kv, int64_t seq_q) {
    CaseSpec spec = shape("", 1, heads_q, heads_kv, seq_q, 256, 64, 64);
    spec.dtype = GetParam();
    Case c(spec);
    return count(c, Pass::kForward).instructions.copy_async;
  };
  CaseSpec any = shape("", 1, 1, 1, 1, 1, 64, 64);
  any.dtype = GetParam();
  const int64_t rows = cuda::plan_forward(Case(any).problem, {}, {}).forward.variant->tile_q;
  const uint64_t one_head = copies(1, 1, rows);
  EXPECT_EQ(copies(4, 1, rows / 4), one_head);
  EXPECT_EQ(copies(8, 2, rows / 4), 2 * one_head);
  EXPECT_EQ(copies(4, 4, rows / 4), 4 * one_head);
}

// A block of queries waits for others twice per tile of keys, for K and for V, and at no other time.
TEST_P(CudaWork, TwoBarriersATile) {
  CaseSpec spec = shape("", 1, 1, 1, 128, 256, 64, 64);
  spec.dtype = GetParam();
  Case c(spec);
  const cuda::Variant& v = *cuda::plan_forward(c.problem, {}, {}).forward.variant;
  const Tiles tiles = visible_tiles(c, v.tile_q, v.tile_kv);
  // One more for each block, after what its sequence is has been written down.
  const int64_t blocks = (spec.seq_q + v.tile_q - 1) / v.tile_q;
  EXPECT_EQ(count(c, Pass::kForward).instructions.block_barrier, uint64_t(2 * tiles.pairs + blocks));
}

}  // namespace
}  // namespace fae::testing
