// Bank conflicts, sectors and instructions of access patterns with known costs.
#include <map>
#include <vector>

#include "emu_test.h"

namespace fae::cuda::testing {
namespace {

class EmuCounter : public EmulatorTest {
 protected:
  void SetUp() override {
    EmulatorTest::SetUp();
    emu::options().count = true;
  }
};

// The only site of an operation.
emu::AccessSite site(const std::string& op) {
  emu::AccessSite found;
  int count = 0;
  for (const emu::AccessSite& s : emu::access_sites()) {
    if (s.op == op) found = s, ++count;
  }
  EXPECT_EQ(count, 1) << op;
  return found;
}

// Passes beyond the fewest when lane l stores a T at byte address(l).
template <class T, class Address>
uint64_t extra_of(Address address) {
  emu::reset_counters();
  emu::options().races = false;
  launch({32, 16384}, [&] { store_shared((shared_memory() + address(lane_index())).template as<T>(), T{}); });
  EXPECT_EQ(site("store_shared").accesses, 1u);
  return site("store_shared").extra_wavefronts;
}

TEST_F(EmuCounter, BankConflicts) {
  EXPECT_EQ(extra_of<float>([](int l) { return 4 * l; }), 0u);
  EXPECT_EQ(extra_of<float>([](int l) { return 4 * (31 - l); }), 0u);
  EXPECT_EQ(extra_of<float>([](int) { return 64; }), 0u);             // one word for all
  EXPECT_EQ(extra_of<float>([](int l) { return l / 8 * 132; }), 0u);  // four words, four banks
  EXPECT_EQ(extra_of<float>([](int l) { return 8 * l; }), 1u);
  EXPECT_EQ(extra_of<float>([](int l) { return 32 * l; }), 7u);
  EXPECT_EQ(extra_of<float>([](int l) { return 128 * l; }), 31u);
  EXPECT_EQ(extra_of<float>([](int l) { return 132 * l; }), 0u);  // padded rows
  EXPECT_EQ(extra_of<uint16_t>([](int l) { return 2 * l; }), 0u);
  EXPECT_EQ(extra_of<uint16_t>([](int l) { return 128 * (l / 2) + 2 * (l % 2); }), 15u);
}

TEST_F(EmuCounter, BankConflictsOfWideAccesses) {
  EXPECT_EQ(extra_of<double>([](int l) { return 8 * l; }), 0u);
  EXPECT_EQ(extra_of<double>([](int l) { return 16 * l; }), 2u);  // two ways in each half
  EXPECT_EQ(extra_of<double>([](int l) { return 128 * l; }), 30u);
  EXPECT_EQ(extra_of<Vec16>([](int l) { return 16 * l; }), 0u);
  EXPECT_EQ(extra_of<Vec16>([](int l) { return 128 * l; }), 28u);  // eight ways in each quarter
  // The usual swizzle of rows of 128 bytes.
  EXPECT_EQ(extra_of<Vec16>([](int l) { return 128 * l + 16 * (l % 8); }), 0u);
}

TEST_F(EmuCounter, BankConflictsOfMatrixLoads) {
  const auto extra = [](int pitch) {
    emu::reset_counters();
    launch({32, 16384}, [&] {
      for (int i = 0; i < 4096; i += 32) store_shared(shared_memory().as<float>() + i + lane_index(), 0.0f);
      warp_barrier();
      uint32_t out[4];
      ldmatrix_x4(out, shared_memory() + lane_index() * pitch);
    });
    EXPECT_EQ(site("store_shared").accesses, 128u);
    EXPECT_EQ(site("store_shared").extra_wavefronts, 0u);
    EXPECT_EQ(site("ldmatrix_x4").accesses, 1u);
    return site("ldmatrix_x4").extra_wavefronts;
  };
  EXPECT_EQ(extra(16), 0u);
  EXPECT_EQ(extra(128), 28u);
  EXPECT_EQ(extra(144), 0u);
}

TEST_F(EmuCounter, Sectors) {
  alignas(32) static float x[1024];
  emu::ScopedRange range((const void*)x, sizeof(x), "x", emu::Access::kReadWrite);
  const auto sectors = [&](int stride, int offset) {
    emu::reset_counters();
    launch({}, [&] { load_global(x + offset + lane_index() * stride); });
    return std::pair(site("load_global").sectors, site("load_global").ideal_sectors);
  };
  using Pair = std::pair<uint64_t, uint64_t>;
  EXPECT_EQ(sectors(1, 0), Pair(4, 4));
  EXPECT_EQ(sectors(1, 1), Pair(5, 4));
  EXPECT_EQ(sectors(2, 0), Pair(8, 4));
  EXPECT_EQ(sectors(8, 0), Pair(32, 4));
  EXPECT_EQ(sectors(0, 0), Pair(1, 1));
  emu::reset_counters();
  launch({64, 2048}, [&] {
    copy_async_16(shared_memory() + thread_index() * 16, x + thread_index() * 4, thread_index() < 48);
    if (thread_index() < 16) store_global(x + 512 + thread_index() * 8, 1.0f);
  });
  EXPECT_EQ(site("copy_async_16").accesses, 2u);
  EXPECT_EQ(site("copy_async_16").extra_wavefronts, 0u);
  EXPECT_EQ(site("copy_async_16").sectors, 24u);
  EXPECT_EQ(site("copy_async_16").ideal_sectors, 24u);
  EXPECT_EQ(site("store_global").sectors, 16u);
  EXPECT_EQ(site("store_global").ideal_sectors, 2u);
}

TEST_F(EmuCounter, LanesAreGroupedInLoops) {
  // Every lane makes its accesses alone; the k-th of all lanes belong together.
  launch({64, 2 * 128 * 4}, [] {
    for (int i = 0; i < 4; ++i) {
      store_shared(shared_memory().as<float>() + warp_index() * 128 + i * 32 + lane_index(), 0.0f);
      if (i % 2) shuffle_xor(0.0f, 1);
    }
  });
  EXPECT_EQ(site("store_shared").accesses, 8u);
  EXPECT_EQ(site("store_shared").extra_wavefronts, 0u);
}

TEST_F(EmuCounter, SitesAreLinesOfFiles) {
  const int line = __LINE__ + 2;
  launch({}, [] {
    store_shared(shared_memory().as<float>() + lane_index(), 0.0f);
    store_shared(shared_memory().as<float>() + 32 + lane_index() * 4, 0.0f,
                 emu::Where{"/x/csrc/cuda/a.h", 7});
  });
  std::map<std::string, uint64_t> extra;
  for (const emu::AccessSite& s : emu::access_sites()) {
    extra[s.file + ":" + std::to_string(s.line)] = s.extra_wavefronts;
  }
  EXPECT_EQ(extra,
            (std::map<std::string, uint64_t>{{"csrc/cuda/a.h:7", 3},
                                             {"tests/cpp/emu_counter_test.cpp:" + std::to_string(line), 0}}));
}

TEST_F(EmuCounter, Instructions) {
  emu::options().count = false;
  launch({64, 2048, 3}, [] {
    store_shared(shared_memory().as<float>() + thread_index() * 4, 0.0f);
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    for (int i = 0; i < 5; ++i) mma_m16n8k16_bf16(d, a, b);
    mma_m16n8k8_tf32(d, a, b);
    warp_barrier();
    block_barrier();
  });
  const emu::Instructions& n = emu::instructions();
  EXPECT_EQ(n.mma, 3 * 2 * 6u);
  EXPECT_EQ(n.warp_barrier, 3 * 2u);
  EXPECT_EQ(n.block_barrier, 3u);
  EXPECT_EQ(n.store_shared, 3 * 64u);
  EXPECT_EQ(n.load_shared + n.ldmatrix + n.shuffle + n.copy_async, 0u);
  EXPECT_TRUE(emu::access_sites().empty());
}

}  // namespace
}  // namespace fae::cuda::testing
