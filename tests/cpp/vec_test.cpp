// The vector contract of cpu/simd/vec.h, for every ISA.
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "guarded.h"
#include "isa_test.h"

namespace fae::cpu {
namespace {

using fae::testing::Guarded;
using probe::StorageProbe;
using probe::VecProbe;

template <class Real>
using Lanes = std::vector<Real>;

template <class Real>
constexpr Real kInf = std::numeric_limits<Real>::infinity();
template <class Real>
constexpr Real kNan = std::numeric_limits<Real>::quiet_NaN();

// Ordinary values, and every pairing of the special ones over successive vectors.
template <class Real>
const std::vector<Real>& samples() {
  static const std::vector<Real> values = [] {
    std::vector<Real> v = {0,
                           -Real(0),
                           1,
                           -1,
                           kInf<Real>,
                           -kInf<Real>,
                           kNan<Real>,
                           std::numeric_limits<Real>::max(),
                           std::numeric_limits<Real>::min()};
    std::mt19937 random(3);
    std::normal_distribution<double> normal(0, 10);
    while (v.size() < 16) v.push_back(Real(normal(random)));
    return v;
  }();
  return values;
}

template <class Real>
bool same(Real a, Real b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}

// fn(a, b, c) with vectors in which all pairs of samples meet.
template <class Real, class Fn>
void for_each_operands(int width, Fn&& fn) {
  const auto& s = samples<Real>();
  Lanes<Real> a(static_cast<size_t>(width)), b = a, c = a;
  for (size_t shift = 0; shift < s.size(); ++shift) {
    for (size_t start = 0; start < s.size(); start += size_t(width)) {
      for (size_t i = 0; i < size_t(width); ++i) {
        a[i] = s[(start + i) % s.size()];
        b[i] = s[(start + i + shift) % s.size()];
        c[i] = s[(start + 3 * i + 2 * shift) % s.size()];
      }
      fn(a, b, c);
    }
  }
}

FAE_ISA_SUITE(Vec);

TEST_P(Vec, ShapeFitsTheKernels) {
  for_each_vec(isa(), [](const auto& v) {
    EXPECT_GE(v.width, 2);
    EXPECT_EQ(v.width & (v.width - 1), 0);
    EXPECT_LE(v.tile_rows, probe::kMaxRows);
    EXPECT_GE(v.tile_rows, 1);
    // Sums of a row stay independent of the panel it starts at: see softmax_row().
    EXPECT_EQ(v.tile_vecs % 2, 0);
  });
}

template <class Real>
void check_arithmetic(const VecProbe<Real>& v) {
  const size_t n = size_t(v.width);
  Lanes<Real> r(n);
  for_each_operands<Real>(v.width, [&](const auto& a, const auto& b, const auto& c) {
    const auto expect = [&](const char* name, auto&& scalar) {
      for (size_t i = 0; i < n; ++i) {
        ASSERT_TRUE(same(r[i], scalar(i)))
            << name << '(' << a[i] << ", " << b[i] << ", " << c[i] << ") = " << r[i];
      }
    };
    v.add(a.data(), b.data(), r.data());
    expect("add", [&](size_t i) { return a[i] + b[i]; });
    v.sub(a.data(), b.data(), r.data());
    expect("sub", [&](size_t i) { return a[i] - b[i]; });
    v.mul(a.data(), b.data(), r.data());
    expect("mul", [&](size_t i) { return a[i] * b[i]; });
    v.div(a.data(), b.data(), r.data());
    expect("div", [&](size_t i) { return a[i] / b[i]; });
    v.max(a.data(), b.data(), r.data());
    for (size_t i = 0; i < n; ++i) {
      const Real wanted = a[i] > b[i] ? a[i] : b[i];  // b where either is NaN
      ASSERT_TRUE(std::isnan(wanted) ? std::isnan(r[i]) : r[i] == wanted)
          << a[i] << ' ' << b[i] << ' ' << r[i];
    }
    v.fma(a.data(), b.data(), c.data(), r.data());
    for (size_t i = 0; i < n; ++i) {
      const Real fused = std::fma(a[i], b[i], c[i]), rounded = a[i] * b[i] + c[i];
      ASSERT_TRUE(same(r[i], fused) || same(r[i], rounded)) << a[i] << ' ' << b[i] << ' ' << c[i];
    }
  });
}
TEST_P(Vec, Arithmetic) {
  for_each_vec(isa(), [](const auto& v) { check_arithmetic(v); });
}

template <class Real>
void check_compare(const VecProbe<Real>& v) {
  const size_t n = size_t(v.width);
  Lanes<Real> x(n), y(n), r(n);
  for (size_t i = 0; i < n; ++i) x[i] = Real(i + 1), y[i] = -Real(i + 1);
  y[0] = kNan<Real>;
  for_each_operands<Real>(v.width, [&](const auto& a, const auto& b, const auto&) {
    v.less(a.data(), b.data(), x.data(), y.data(), r.data());
    for (size_t i = 0; i < n; ++i)
      ASSERT_TRUE(same(r[i], a[i] < b[i] ? x[i] : y[i])) << a[i] << " < " << b[i];
    v.equal(a.data(), b.data(), x.data(), y.data(), r.data());
    for (size_t i = 0; i < n; ++i)
      ASSERT_TRUE(same(r[i], a[i] == b[i] ? x[i] : y[i])) << a[i] << " == " << b[i];
  });
}
TEST_P(Vec, CompareAndSelect) {
  for_each_vec(isa(), [](const auto& v) { check_compare(v); });
}

template <class Real>
void check_bytes_set(const VecProbe<Real>& v) {
  const size_t width = size_t(v.width);
  Lanes<Real> x(width, Real(1)), y(width, Real(2)), r(width);
  for (size_t n = 0; n <= width; ++n) {
    Guarded<uint8_t> bytes(n);
    const uint32_t patterns = width <= 8 ? 1u << n : 512;
    std::mt19937 random(5);
    for (uint32_t k = 0; k < patterns; ++k) {
      const uint32_t pattern = width <= 8 ? k : uint32_t(random());
      for (size_t i = 0; i < n; ++i) bytes[i] = uint8_t(pattern >> i & 1 ? (i % 2 ? 1 : 0x80 >> i % 8) : 0);
      v.bytes_set(bytes.data(), int(n), x.data(), y.data(), r.data());
      for (size_t i = 0; i < width; ++i) ASSERT_EQ(r[i], i < n && bytes[i] ? x[i] : y[i]) << n << ' ' << i;
    }
  }
}
TEST_P(Vec, BytesSetReadsOnlyItsBytes) {
  for_each_vec(isa(), [](const auto& v) { check_bytes_set(v); });
}

template <class Real>
void check_reduce(const VecProbe<Real>& v) {
  const size_t n = size_t(v.width);
  Lanes<Real> x(n);
  for (size_t lane = 0; lane < n; ++lane) {
    for (size_t i = 0; i < n; ++i) x[i] = -Real(2 + i);
    x[lane] = Real(-1);
    EXPECT_EQ(v.reduce_max(x.data()), Real(-1)) << lane;
    std::fill(x.begin(), x.end(), -kInf<Real>);
    EXPECT_EQ(v.reduce_max(x.data()), -kInf<Real>);
    std::fill(x.begin(), x.end(), Real(0));
    x[lane] = Real(3);
    EXPECT_EQ(v.reduce_add(x.data()), Real(3)) << lane;
    x[lane] = kNan<Real>;
    EXPECT_TRUE(std::isnan(v.reduce_add(x.data()))) << lane;
    x[lane] = kInf<Real>;
    EXPECT_EQ(v.reduce_add(x.data()), kInf<Real>) << lane;
    EXPECT_EQ(v.reduce_max(x.data()), kInf<Real>) << lane;
  }
  for (size_t i = 0; i < n; ++i) x[i] = Real(size_t(1) << i);
  EXPECT_EQ(v.reduce_add(x.data()), Real((size_t(1) << n) - 1));
}
TEST_P(Vec, Reduce) {
  for_each_vec(isa(), [](const auto& v) { check_reduce(v); });
}

// One element of the block at a time, so that each is found in its row's sum and in no other.
template <class Real>
void check_reduce_each(const VecProbe<Real>& v) {
  const size_t n = size_t(v.width);
  Lanes<Real> block(n * n), sums(n);
  for (size_t i = 0; i < n * n; ++i) {
    block[i] = Real(i + 1);
    v.reduce_each(block.data(), sums.data());
    for (size_t row = 0; row < n; ++row) ASSERT_EQ(sums[row], row == i / n ? Real(i + 1) : Real(0)) << i;
    block[i] = 0;
  }
}
TEST_P(Vec, ReduceEach) {
  for_each_vec(isa(), [](const auto& v) { check_reduce_each(v); });
}

template <class Real>
void check_transpose(const VecProbe<Real>& v) {
  const size_t n = size_t(v.width);
  Lanes<Real> block(n * n);
  for (size_t i = 0; i < n * n; ++i) block[i] = Real(i);
  v.transpose(block.data());
  for (size_t i = 0; i < n; ++i) {
    for (size_t j = 0; j < n; ++j) ASSERT_EQ(block[i * n + j], Real(j * n + i)) << i << ',' << j;
  }
}
TEST_P(Vec, Transpose) {
  for_each_vec(isa(), [](const auto& v) { check_transpose(v); });
}

template <class S>
S storage_of(double x) {
  return from_double<S>(x);
}

// n elements lie against a guard page on either side; lanes beyond n are 0 and memory
// beyond n is untouched.
template <class Real, class S>
void check_storage(const StorageProbe<Real, S>& s, int width) {
  if (!s.load) return;
  using Array = Guarded<S>;
  for (auto side : {Array::Side::kBegin, Array::Side::kEnd}) {
    for (int n = 0; n <= width; ++n) {
      Array memory(static_cast<size_t>(n), side);
      for (int i = 0; i < n; ++i) memory[size_t(i)] = storage_of<S>(i + 1.5);
      Lanes<Real> lanes(size_t(width), Real(99));
      s.load_n(memory.data(), n, lanes.data());
      for (int i = 0; i < width; ++i) ASSERT_EQ(lanes[size_t(i)], i < n ? Real(i + 1.5) : Real(0)) << n;
      if (n == width) {
        std::fill(lanes.begin(), lanes.end(), Real(99));
        s.load(memory.data(), lanes.data());
        for (int i = 0; i < width; ++i) ASSERT_EQ(lanes[size_t(i)], Real(i + 1.5));
      }
      for (int i = 0; i < width; ++i) lanes[size_t(i)] = Real(-i - 2.5);
      s.store_n(memory.data(), lanes.data(), n);
      for (int i = 0; i < n; ++i) ASSERT_EQ(Real(to_float(memory[size_t(i)])), Real(-i - 2.5)) << n;
    }
  }
  // Within a longer array, the neighbours keep their values.
  for (int n = 0; n <= width; ++n) {
    std::vector<S> memory(size_t(width) + 2, storage_of<S>(7));
    Lanes<Real> lanes(size_t(width), Real(1));
    s.store_n(memory.data() + 1, lanes.data(), n);
    for (int i = 0; i < width + 2; ++i) {
      ASSERT_EQ(Real(to_float(memory[size_t(i)])), Real(i >= 1 && i <= n ? 1 : 7)) << n << ' ' << i;
    }
  }
}
template <class Real>
void check_all_storage(const VecProbe<Real>& v) {
  check_storage(v.own, v.width);
  check_storage(v.bf16, v.width);
  check_storage(v.f16, v.width);
}
TEST_P(Vec, LoadsAndStoresOnlyTheFirstLanes) {
  for_each_vec(isa(), [](const auto& v) { check_all_storage(v); });
}

// All 65536 patterns, and rounding of values between them, agree with core/dtype.h.
template <class S>
void check_conversion(const StorageProbe<float, S>& s, int width, float (*widen)(S), S (*narrow)(float)) {
  std::vector<S> memory(static_cast<size_t>(width));
  Lanes<float> lanes(static_cast<size_t>(width));
  for (int first = 0; first < 65536; first += width) {
    for (int i = 0; i < width; ++i) memory[size_t(i)] = S{uint16_t(first + i)};
    s.load(memory.data(), lanes.data());
    for (int i = 0; i < width; ++i) {
      const float wanted = widen(S{uint16_t(first + i)});
      ASSERT_TRUE(std::isnan(wanted) ? std::isnan(lanes[size_t(i)])
                                     : bit_cast<uint32_t>(wanted) == bit_cast<uint32_t>(lanes[size_t(i)]))
          << first + i;
    }
  }
  std::mt19937 random(11);
  for (int round = 0; round < 40000; ++round) {
    for (int i = 0; i < width; ++i) {
      uint32_t bits = uint32_t(random());
      // Half of the values lie within the range of float16, a quarter of all are ties.
      if (random() % 2) bits = (bits & 0x80ffffffu) | (0x33000000u + (uint32_t(random()) % 0x15u << 24));
      if (random() % 4 == 0) bits &= 0xfffff000u;
      if (random() % 4 == 0) bits &= 0xffff8000u;
      lanes[size_t(i)] = bit_cast<float>(bits);
    }
    s.store(memory.data(), lanes.data());
    for (int i = 0; i < width; ++i) {
      const S wanted = narrow(lanes[size_t(i)]), got = memory[size_t(i)];
      if (std::isnan(lanes[size_t(i)])) {
        ASSERT_TRUE(std::isnan(widen(got)));
      } else {
        ASSERT_EQ(got.bits, wanted.bits) << std::hexfloat << lanes[size_t(i)];
      }
    }
  }
}
TEST_P(Vec, ConvertsLikeTheScalarFunctions) {
  const auto& v = isa().f32;
  check_conversion<BFloat16>(v.bf16, v.width, [](BFloat16 x) { return to_float(x); }, to_bfloat16);
  check_conversion<Float16>(v.f16, v.width, [](Float16 x) { return to_float(x); }, to_float16);
}

}  // namespace
}  // namespace fae::cpu
