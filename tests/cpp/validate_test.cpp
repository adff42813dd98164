// The one predicate on calls, and the problem that a valid call describes.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "core/describe.h"
#include "described.h"

namespace fae {
namespace {

using Kind = CallError::Kind;

TensorDesc tensor(const std::vector<int64_t>& shape, DType t = DType::kFloat32) {
  return testing::described(shape, t);
}

CallDesc good_call() {
  CallDesc c;
  c.q = tensor({2, 5, 6, 8});
  c.k = tensor({2, 7, 3, 8});
  c.v = tensor({2, 7, 3, 4});
  return c;
}

// The error names the argument and what was given.
void expect_error(const CallDesc& call, Kind kind, const std::vector<std::string>& parts) {
  const auto e = validate(call);
  ASSERT_TRUE(e.has_value()) << "accepted; expected: " << parts.front();
  EXPECT_EQ(int(e->kind), int(kind)) << e->text;
  for (const std::string& part : parts)
    EXPECT_NE(e->text.find(part), std::string::npos) << e->text << " lacks " << part;
  EXPECT_EQ(e->text.find('\n'), std::string::npos);
}

TEST(Validate, AcceptsEveryLegalForm) {
  EXPECT_FALSE(validate(good_call()));
  for (DType t : {DType::kFloat16, DType::kBFloat16, DType::kFloat64}) {
    CallDesc c = good_call();
    c.q.dtype = c.k.dtype = c.v.dtype = t;
    EXPECT_FALSE(validate(c));
  }
  CallDesc heads_first = good_call();
  heads_first.layout = Layout::kBhsd;
  heads_first.q = tensor({2, 6, 5, 8});
  heads_first.k = tensor({2, 3, 7, 8});
  heads_first.v = tensor({2, 3, 7, 4});
  EXPECT_FALSE(validate(heads_first));
  CallDesc no_batch;
  no_batch.q = tensor({5, 6, 8}), no_batch.k = tensor({7, 3, 8}), no_batch.v = tensor({7, 3, 4});
  EXPECT_FALSE(validate(no_batch));
  CallDesc one_head;
  one_head.q = tensor({5, 8}), one_head.k = tensor({7, 8}), one_head.v = tensor({7, 4});
  EXPECT_FALSE(validate(one_head));
  CallDesc empty;
  empty.q = tensor({0, 0, 0, 8}), empty.k = tensor({0, 0, 0, 8}), empty.v = tensor({0, 0, 0, 4});
  EXPECT_FALSE(validate(empty));
}

TEST(Validate, Ranks) {
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{8}, {1, 2, 5, 6, 8}}) {
    CallDesc c = good_call();
    c.q = tensor(shape);
    expect_error(c, Kind::kValue, {"q ", shape_text(c.q)});
  }
  CallDesc c = good_call();
  c.k = tensor({7, 3, 8});
  expect_error(c, Kind::kValue, {"k ", "(7, 3, 8)", "(2, 5, 6, 8)"});
  c = good_call();
  c.v = tensor({7, 4});
  expect_error(c, Kind::kValue, {"v ", "(7, 4)"});
}

TEST(Validate, Shapes) {
  const auto check = [](auto&& change, const std::vector<std::string>& parts) {
    CallDesc c = good_call();
    change(c);
    expect_error(c, Kind::kValue, parts);
  };
  check([](CallDesc& c) { c.k = tensor({3, 7, 3, 8}); }, {"k ", "(3, 7, 3, 8)", "batch"});
  check([](CallDesc& c) { c.v = tensor({1, 7, 3, 4}); }, {"v ", "(1, 7, 3, 4)", "batch"});
  check([](CallDesc& c) { c.k = tensor({2, 7, 3, 9}); }, {"k ", "(2, 7, 3, 9)", "head dim"});
  check([](CallDesc& c) { c.v = tensor({2, 7, 2, 4}); }, {"v ", "heads"});
  check([](CallDesc& c) { c.v = tensor({2, 6, 3, 4}); }, {"v ", "sequence"});
  check([](CallDesc& c) { c.q = tensor({2, 5, 7, 8}); }, {"q ", "7", "3", "multiple"});
  check([](CallDesc& c) { c.k = tensor({2, 7, 0, 8}), c.v = tensor({2, 7, 0, 4}); }, {"q ", "heads"});
  check([](CallDesc& c) { c.q = tensor({2, 5, 6, 1025}), c.k = tensor({2, 7, 3, 1025}); }, {"1025", "1024"});
  check([](CallDesc& c) { c.v = tensor({2, 7, 3, 0}); }, {"v ", "head dim"});
}

TEST(Validate, Dtypes) {
  CallDesc c = good_call();
  c.q.dtype = DType::kInt64;
  expect_error(c, Kind::kType, {"q ", "int64", "float16"});
  c = good_call();
  c.q.dtype = DType::kOther;
  c.q.dtype_name = "complex64";
  expect_error(c, Kind::kType, {"q ", "complex64"});
  c = good_call();
  c.v.dtype = DType::kBFloat16;
  expect_error(c, Kind::kType, {"v ", "bfloat16", "float32"});
  c = good_call();
  c.mask = tensor({5, 7});
  expect_error(c, Kind::kType, {"mask ", "float32", "bool"});
  c = good_call();
  c.bias = tensor({5, 7}, DType::kBool);
  expect_error(c, Kind::kType, {"bias ", "bool"});
  c = good_call();
  c.kv_lengths = tensor({2}, DType::kFloat32);
  expect_error(c, Kind::kType, {"kv_lengths ", "float32", "int32"});
}

TEST(Validate, Devices) {
  CallDesc c = good_call();
  c.v.device = "cuda:0";
  expect_error(c, Kind::kValue, {"v ", "cuda:0", "cpu"});
  c = good_call();
  c.bias = tensor({5, 7});
  c.bias.device = "meta";
  expect_error(c, Kind::kValue, {"bias ", "meta"});
}

TEST(Validate, MasksAndBiasesBroadcast) {
  for (const std::vector<int64_t>& shape :
       {std::vector<int64_t>{}, {1}, {7}, {5, 1}, {5, 7}, {6, 5, 7}, {1, 1, 7}, {2, 6, 5, 7}, {2, 1, 1, 7}}) {
    CallDesc c = good_call();
    c.mask = tensor(shape, DType::kBool);
    c.bias = tensor(shape, DType::kFloat64);
    EXPECT_FALSE(validate(c)) << shape_text(c.mask);
  }
  for (const std::vector<int64_t>& shape :
       {std::vector<int64_t>{5}, {7, 5}, {3, 5, 7}, {2, 5, 7}, {6, 2, 5, 7}, {1, 2, 6, 5, 7}, {0, 6, 5, 7}}) {
    CallDesc c = good_call();
    c.mask = tensor(shape, DType::kBool);
    expect_error(c, Kind::kValue, {"mask ", shape_text(c.mask), "(2, 6, 5, 7)"});
    c = good_call();
    c.bias = tensor(shape);
    expect_error(c, Kind::kValue, {"bias ", shape_text(c.bias), "(2, 6, 5, 7)"});
  }
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{}, {1}, {3}, {2, 1}}) {
    CallDesc c = good_call();
    c.kv_lengths = tensor(shape, DType::kInt32);
    expect_error(c, Kind::kValue, {"kv_lengths ", shape_text(c.kv_lengths)});
  }
}

TEST(Validate, Options) {
  const double nan = std::nan(""), inf = std::numeric_limits<double>::infinity();
  for (double x : {nan, inf, -inf}) {
    CallDesc c = good_call();
    c.scale = x;
    expect_error(c, Kind::kValue, {"scale "});
    c = good_call();
    c.softcap = x;
    expect_error(c, Kind::kValue, {"softcap "});
  }
  CallDesc c = good_call();
  c.softcap = -1;
  expect_error(c, Kind::kValue, {"softcap ", "-1"});
  for (bool left : {true, false}) {
    c = good_call();
    (left ? c.window_left : c.window_right) = -2;
    expect_error(c, Kind::kValue, {"window ", "-2"});
  }
  c = good_call();
  c.scale = 0.0, c.softcap = 50, c.window_left = 0, c.window_right = 1;
  EXPECT_FALSE(validate(c));
}

TEST(Validate, Out) {
  std::vector<float> memory(4096);
  CallDesc c = good_call();
  c.q.data = memory.data();
  c.out = tensor({2, 5, 6, 4});
  c.out.data = memory.data() + 480;  // right after q
  EXPECT_FALSE(validate(c));
  c.out.data = memory.data() + 479;
  expect_error(c, Kind::kValue, {"out ", "q", "overlap"});
  c.out.data = memory.data() + 1000;
  c.k.data = memory.data() + 1000;
  expect_error(c, Kind::kValue, {"out ", "k", "overlap"});
  c = good_call();
  c.out = tensor({2, 5, 6, 8});
  expect_error(c, Kind::kValue, {"out ", "(2, 5, 6, 8)", "(2, 5, 6, 4)"});
  c.out = tensor({2, 5, 6, 4}, DType::kFloat64);
  expect_error(c, Kind::kType, {"out ", "float64"});
  c.out = tensor({2, 5, 6, 4});
  c.out.stride[0] = 0;
  expect_error(c, Kind::kValue, {"out ", "strides"});
  c.out = tensor({2, 5, 6, 4});
  c.out.stride[3] = 0;
  expect_error(c, Kind::kValue, {"out ", "strides"});
}

TEST(Describe, ShapeText) {
  EXPECT_EQ(shape_text(tensor({})), "()");
  EXPECT_EQ(shape_text(tensor({3})), "(3,)");
  EXPECT_EQ(shape_text(tensor({2, 3})), "(2, 3)");
}

TEST(Describe, ProblemAxesInBothLayouts) {
  CallDesc c = good_call();
  c.causal = Causal::kBottomRight;
  c.mask = tensor({2, 1, 1, 7}, DType::kBool);
  c.bias = tensor({6, 5, 1}, DType::kFloat16);
  uint8_t any;
  c.mask.data = c.bias.data = &any;
  const int64_t lengths[] = {3, 9};
  c.kv_lengths = tensor({2}, DType::kInt64);
  c.kv_lengths.data = const_cast<int64_t*>(lengths);
  const Problem p = make_problem(c);
  EXPECT_EQ(p.batch, 2);
  EXPECT_EQ(p.heads_q, 6);
  EXPECT_EQ(p.heads_kv, 3);
  EXPECT_EQ(p.seq_q, 5);
  EXPECT_EQ(p.seq_kv, 7);
  EXPECT_EQ(p.dim, 8);
  EXPECT_EQ(p.dim_v, 4);
  EXPECT_EQ(p.group(), 2);
  EXPECT_EQ(p.q.stride[0], 240);
  EXPECT_EQ(p.q.stride[1], 8);
  EXPECT_EQ(p.q.stride[2], 48);
  EXPECT_EQ(p.q.stride[3], 1);
  EXPECT_EQ(p.masking.band.hi, 2);
  EXPECT_EQ(p.masking.mask.stride[0], 7);
  EXPECT_EQ(p.masking.mask.stride[1], 0);
  EXPECT_EQ(p.masking.mask.stride[2], 0);
  EXPECT_EQ(p.masking.mask.stride[3], 1);
  EXPECT_EQ(p.score.bias.stride[0], 0);
  EXPECT_EQ(p.score.bias.stride[1], 5);
  EXPECT_EQ(p.score.bias.stride[2], 1);
  EXPECT_EQ(p.score.bias.stride[3], 0);
  EXPECT_EQ(p.score.bias_dtype, DType::kFloat16);
  EXPECT_EQ(p.masking.kv_lengths.at(0, 7), 3);
  EXPECT_EQ(p.masking.kv_lengths.at(1, 7), 7);
  EXPECT_DOUBLE_EQ(p.score.scale, 1 / std::sqrt(8.0));

  CallDesc h = c;
  h.layout = Layout::kBhsd;
  h.q = tensor({2, 6, 5, 8}), h.k = tensor({2, 3, 7, 8}), h.v = tensor({2, 3, 7, 4});
  h.scale = 2.0;
  const Problem same = make_problem(h);
  EXPECT_EQ(same.heads_q, 6);
  EXPECT_EQ(same.seq_q, 5);
  EXPECT_EQ(same.q.stride[1], 40);
  EXPECT_EQ(same.q.stride[2], 8);
  EXPECT_EQ(same.score.scale, 2.0);
}

}  // namespace
}  // namespace fae
