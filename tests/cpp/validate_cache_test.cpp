// The predicate on calls on a cache, where lengths and tables lie on a device: what can be known without
// them.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "core/describe_cache.h"
#include "described.h"

namespace fae {
namespace {

using Kind = CallError::Kind;

TensorDesc on_device(const std::vector<int64_t>& shape, DType dtype = DType::kFloat32) {
  TensorDesc d = testing::described(shape, dtype);
  d.device = "cuda:0";
  return d;
}

// One new key for each of two sequences in a cache of 8.
CacheCallDesc device_call(int64_t length) {
  CacheCallDesc call;
  call.q = on_device({2, 3, 4, 8});
  call.k_cache = call.v_cache = on_device({2, 8, 2, 8});
  call.k = call.v = on_device({2, 1, 2, 8});
  call.cache_length = length;
  call.causal = Causal::kBottomRight;
  return call;
}

void use_pages(CacheCallDesc* call, int64_t pages) {
  call->k_cache = call->v_cache = on_device({pages, 4, 2, 8});
  call->block_table = on_device({2, 2}, DType::kInt32);
}

void use_rotary(CacheCallDesc* call, int64_t positions) {
  call->rotary_cos = call->rotary_sin = on_device({positions, 4});
}

void expect_error(const CacheCallDesc& call, Kind kind, const std::string& text) {
  const auto e = validate(call);
  ASSERT_TRUE(e.has_value()) << "accepted; expected: " << text;
  EXPECT_EQ(int(e->kind), int(kind)) << e->text;
  EXPECT_NE(e->text.find(text), std::string::npos) << e->text << " lacks " << text;
}

TEST(ValidateCache, LengthThatIsANumberIsCheckedOnEveryDevice) {
  EXPECT_FALSE(validate(device_call(7)));
  expect_error(device_call(8), Kind::kValue, "cache_lengths is 8 for sequence 0 and 1 to append");
  expect_error(device_call(-1), Kind::kValue, "cache_lengths is -1");
  CacheCallDesc call = device_call(9);
  call.k = call.v = TensorDesc();
  expect_error(call, Kind::kValue, "cache_lengths is 9");
  call.cache_length = 8;
  EXPECT_FALSE(validate(call));
}

TEST(ValidateCache, PagesForALengthThatIsANumber) {
  CacheCallDesc call = device_call(7);
  use_pages(&call, 5);
  EXPECT_FALSE(validate(call));
  call.cache_length = 8;
  expect_error(call, Kind::kRuntime, "block_table has shape (2, 2)");
  call = device_call(0);
  use_pages(&call, 0);
  expect_error(call, Kind::kRuntime, "room for 0");
}

TEST(ValidateCache, RotaryTablesForALengthThatIsANumber) {
  CacheCallDesc call = device_call(4);
  use_rotary(&call, 7);
  EXPECT_FALSE(validate(call));
  use_rotary(&call, 6);
  expect_error(call, Kind::kValue, "positions up to 6");
  call.causal = Causal::kNone;  // then queries do not move
  EXPECT_FALSE(validate(call));
  use_rotary(&call, 4);
  expect_error(call, Kind::kValue, "positions up to 4");
}

// Of lengths on the device it is sure that they are not negative.
TEST(ValidateCache, NoLengthWouldDo) {
  CacheCallDesc call = device_call(0);
  call.cache_lengths = on_device({2}, DType::kInt32);
  EXPECT_FALSE(validate(call));
  call.k = call.v = on_device({2, 9, 2, 8});
  expect_error(call, Kind::kValue, "cache_lengths is at least 0 for sequence 0 and 9 to append");
  call.k = call.v = on_device({2, 1, 2, 8});
  use_rotary(&call, 2);
  expect_error(call, Kind::kValue, "positions up to at least 2");
}

}  // namespace
}  // namespace fae
