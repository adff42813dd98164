// Conversions between 16-bit storage and arithmetic types, against their definition.
#include "core/dtype.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace fae {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Value of an IEEE-like pattern with `mantissa` fraction bits in a 16-bit word.
double decode(uint16_t bits, int mantissa) {
  const int exponent_bits = 15 - mantissa;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits & 0x7fff) >> mantissa;
  const int fraction = bits & ((1 << mantissa) - 1);
  double magnitude;
  if (exponent == (1 << exponent_bits) - 1) {
    magnitude = fraction ? std::nan("") : INFINITY;
  } else if (exponent == 0) {
    magnitude = std::ldexp(fraction, 1 - bias - mantissa);
  } else {
    magnitude = std::ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
  }
  return bits & 0x8000 ? -magnitude : magnitude;
}

struct HalfFormat {
  static constexpr int kMantissa = 10;
  static float widen(uint16_t bits) { return to_float(Float16{bits}); }
  static uint16_t narrow(float x) { return to_float16(x).bits; }
};
struct BFloatFormat {
  static constexpr int kMantissa = 7;
  static float widen(uint16_t bits) { return to_float(BFloat16{bits}); }
  static uint16_t narrow(float x) { return to_bfloat16(x).bits; }
};

template <class Format>
class Dtype : public testing::Test {};
using Formats = testing::Types<HalfFormat, BFloatFormat>;
class FormatName {
 public:
  template <class T>
  static std::string GetName(int i) {
    return i == 0 ? "float16" : "bfloat16";
  }
};
TYPED_TEST_SUITE(Dtype, Formats, FormatName);

TYPED_TEST(Dtype, WidensEveryPattern) {
  for (int i = 0; i < 65536; ++i) {
    const double wanted = decode(uint16_t(i), TypeParam::kMantissa);
    const float got = TypeParam::widen(uint16_t(i));
    if (std::isnan(wanted)) {
      ASSERT_TRUE(std::isnan(got)) << i;
    } else {
      ASSERT_EQ(double(got), wanted) << i;
      ASSERT_EQ(std::signbit(got), (i & 0x8000) != 0) << i;
    }
  }
}

TYPED_TEST(Dtype, RoundTripsEveryPattern) {
  for (int i = 0; i < 65536; ++i) {
    const float x = TypeParam::widen(uint16_t(i));
    const uint16_t back = TypeParam::narrow(x);
    if (std::isnan(x)) {
      ASSERT_TRUE(std::isnan(decode(back, TypeParam::kMantissa))) << i;
      ASSERT_EQ(back & 0x8000, i & 0x8000) << i;
    } else {
      ASSERT_EQ(back, i);
    }
  }
}

// Between every two neighbours: the midpoint goes to the even one, all else to the nearer.
TYPED_TEST(Dtype, RoundsToNearestEven) {
  const int infinity = ((1 << (15 - TypeParam::kMantissa)) - 1) << TypeParam::kMantissa;
  for (int sign : {0, 0x8000}) {
    for (int i = 0; i < infinity; ++i) {
      const uint16_t low = uint16_t(i | sign), high = uint16_t((i + 1) | sign);
      const uint16_t even = i % 2 ? high : low;
      const double a = decode(low, TypeParam::kMantissa);
      // The neighbour of the largest finite value, were the exponent range unbounded.
      const double b = i + 1 == infinity ? a + (a - decode(uint16_t(low - 1), TypeParam::kMantissa))
                                         : decode(high, TypeParam::kMantissa);
      const float middle = float((a + b) / 2);
      ASSERT_EQ(double(middle), (a + b) / 2) << i;
      ASSERT_EQ(TypeParam::narrow(middle), even) << i;
      ASSERT_EQ(TypeParam::narrow(std::nextafter(middle, float(a))), low) << i;
      const float above = std::nextafter(middle, sign ? -kInf : kInf);
      ASSERT_EQ(TypeParam::narrow(above), high) << i;
    }
  }
}

TYPED_TEST(Dtype, OverflowAndUnderflow) {
  const int infinity = ((1 << (15 - TypeParam::kMantissa)) - 1) << TypeParam::kMantissa;
  EXPECT_EQ(TypeParam::narrow(std::numeric_limits<float>::max()), infinity);
  EXPECT_EQ(TypeParam::narrow(-std::numeric_limits<float>::max()), infinity | 0x8000);
  EXPECT_EQ(TypeParam::narrow(kInf), infinity);
  EXPECT_EQ(TypeParam::narrow(-kInf), infinity | 0x8000);
  EXPECT_EQ(TypeParam::narrow(std::numeric_limits<float>::denorm_min()), 0);
  EXPECT_EQ(TypeParam::narrow(-std::numeric_limits<float>::denorm_min()), 0x8000);
  EXPECT_EQ(TypeParam::narrow(-0.0f), 0x8000);
}

// A NaN whose payload lies only in bits that are cut off must not become infinite.
TYPED_TEST(Dtype, KeepsNanWithLowPayload) {
  for (uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu, 0x7fc00000u}) {
    const uint16_t narrow = TypeParam::narrow(bit_cast<float>(bits));
    EXPECT_TRUE(std::isnan(decode(narrow, TypeParam::kMantissa))) << std::hex << bits;
    EXPECT_EQ(narrow >> 15, bits >> 31) << std::hex << bits;
  }
}

TEST(DtypeTable, SizesAndNames) {
  EXPECT_EQ(size_of(DType::kFloat16), 2);
  EXPECT_EQ(size_of(DType::kBFloat16), 2);
  EXPECT_EQ(size_of(DType::kFloat32), 4);
  EXPECT_EQ(size_of(DType::kFloat64), 8);
  EXPECT_EQ(size_of(DType::kBool), 1);
  EXPECT_EQ(size_of(DType::kInt32), 4);
  EXPECT_EQ(size_of(DType::kInt64), 8);
  EXPECT_STREQ(name_of(DType::kBFloat16), "bfloat16");
  EXPECT_STREQ(name_of(DTypeOf<Float16>::value), "float16");
  EXPECT_TRUE(is_floating(DType::kFloat64));
  EXPECT_FALSE(is_floating(DType::kBool));
  EXPECT_FALSE(is_floating(DType::kOther));
}

TEST(DtypeTable, LoadsAndStoresByDtype) {
  for (DType t : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
    double memory[3] = {};
    store_from_double(memory, t, 1, -1.5);
    EXPECT_EQ(load_as_double(memory, t, 0), 0.0) << name_of(t);
    EXPECT_EQ(load_as_double(memory, t, 1), -1.5) << name_of(t);
    EXPECT_EQ(load_as_double(memory, t, 2), 0.0) << name_of(t);
  }
}

}  // namespace
}  // namespace fae
