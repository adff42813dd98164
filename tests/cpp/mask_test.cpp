// Bands, key ranges and tile classes against the per-element definition.
#include "core/mask.h"

#include <gtest/gtest.h>

#include <vector>

#include "core/problem.h"

namespace fae {
namespace {

// API.md: causal, window and length, element by element.
bool sees(Causal causal, int64_t left, int64_t right, int64_t seq_q, int64_t seq_kv, int64_t kv_length,
          int64_t i, int64_t j) {
  const int64_t shifted = i + seq_kv - seq_q;
  if (left >= 0 && j < shifted - left) return false;
  if (right >= 0 && j > shifted + right) return false;
  if (causal == Causal::kBottomRight && j > shifted) return false;
  if (causal == Causal::kTopLeft && j > i) return false;
  return j < kv_length;
}

struct Shape {
  Causal causal;
  int64_t left, right, seq_q, seq_kv;
};

template <class Fn>
void for_each_shape(int64_t largest, Fn&& fn) {
  for (Causal causal : {Causal::kNone, Causal::kBottomRight, Causal::kTopLeft}) {
    for (int64_t left : {-1, 0, 1, 3, 100}) {
      for (int64_t right : {-1, 0, 2, 100}) {
        for (int64_t seq_q = 1; seq_q <= largest; ++seq_q) {
          for (int64_t seq_kv = 0; seq_kv <= largest; ++seq_kv) fn(Shape{causal, left, right, seq_q, seq_kv});
        }
      }
    }
  }
}

Band band_of(const Shape& s) { return make_band(s.causal, s.left, s.right, s.seq_q, s.seq_kv); }

TEST(Band, IsThePerElementRule) {
  for_each_shape(8, [](const Shape& s) {
    const Band band = band_of(s);
    for (int64_t i = 0; i < s.seq_q; ++i) {
      for (int64_t j = 0; j < s.seq_kv; ++j) {
        ASSERT_EQ(j >= i + band.lo && j <= i + band.hi,
                  sees(s.causal, s.left, s.right, s.seq_q, s.seq_kv, s.seq_kv, i, j))
            << i << ',' << j;
      }
    }
  });
}

TEST(Band, HugeWindowsAreNone) {
  const int64_t huge = INT64_MAX;
  EXPECT_TRUE(make_band(Causal::kNone, huge, huge, 5, 7).unbounded());
  EXPECT_TRUE(make_band(Causal::kNone, -1, -1, 5, 7).unbounded());
  EXPECT_TRUE(make_band(Causal::kNone, Band::kUnbounded, Band::kUnbounded - 1, 5, 7).unbounded());
  EXPECT_FALSE(make_band(Causal::kNone, 0, -1, 5, 7).unbounded());
  EXPECT_FALSE(make_band(Causal::kTopLeft, huge, huge, 5, 7).unbounded());
}

TEST(KeyRange, CoversExactlyTheVisibleKeys) {
  for_each_shape(7, [](const Shape& s) {
    const Band band = band_of(s);
    for (int64_t length = 0; length <= s.seq_kv; ++length) {
      for (int64_t begin = 0; begin < s.seq_q; ++begin) {
        for (int64_t end = begin + 1; end <= s.seq_q; ++end) {
          const KeyRange range = visible_keys(band, length, begin, end);
          int64_t first = -1, last = -1;
          for (int64_t j = 0; j < s.seq_kv; ++j) {
            for (int64_t i = begin; i < end; ++i) {
              if (!sees(s.causal, s.left, s.right, s.seq_q, s.seq_kv, length, i, j)) continue;
              if (first < 0) first = j;
              last = j;
            }
          }
          ASSERT_LE(range.begin, range.end);
          if (first >= 0) {
            ASSERT_EQ(range.begin, first);
            ASSERT_EQ(range.end, last + 1);
          } else if (end == begin + 1 || band.lo <= band.hi) {
            ASSERT_TRUE(range.empty());
          }
        }
      }
    }
  });
}

// A query is in seeing_queries(keys) exactly when one of the keys is in visible_keys(query).
TEST(KeyRange, SeeingQueriesIsTheTranspose) {
  for_each_shape(7, [](const Shape& s) {
    const Band band = band_of(s);
    if (band.lo > band.hi) return;  // nobody sees anything: any range will do
    for (int64_t begin = 0; begin < s.seq_kv; ++begin) {
      for (int64_t end = begin + 1; end <= s.seq_kv; ++end) {
        const KeyRange queries = seeing_queries(band, s.seq_q, begin, end);
        for (int64_t i = 0; i < s.seq_q; ++i) {
          const KeyRange keys = visible_keys(band, s.seq_kv, i, i + 1);
          const bool overlap = keys.begin < end && begin < keys.end && !keys.empty();
          ASSERT_EQ(i >= queries.begin && i < queries.end, overlap) << "query " << i;
        }
      }
    }
  });
}

TEST(TileClass, IsExactOverAllTiles) {
  for_each_shape(6, [](const Shape& s) {
    const Band band = band_of(s);
    for (int64_t length = 0; length <= s.seq_kv; ++length) {
      for (int64_t q = 0; q < s.seq_q * s.seq_q; ++q) {
        const int64_t q_begin = q / s.seq_q, q_end = q % s.seq_q + 1;
        if (q_begin >= q_end) continue;
        for (int64_t k = 0; k < s.seq_kv * s.seq_kv; ++k) {
          const int64_t k_begin = k / s.seq_kv, k_end = k % s.seq_kv + 1;
          if (k_begin >= k_end) continue;
          bool any = false, all = true;
          for (int64_t i = q_begin; i < q_end; ++i) {
            for (int64_t j = k_begin; j < k_end; ++j) {
              const bool seen = sees(s.causal, s.left, s.right, s.seq_q, s.seq_kv, length, i, j);
              any |= seen;
              all &= seen;
            }
          }
          const TileClass got = classify(band, length, q_begin, q_end, k_begin, k_end);
          ASSERT_EQ(got == TileClass::kFull, all);
          if (any) {
            ASSERT_NE(got, TileClass::kSkip);
          } else if (band.lo <= band.hi) {
            ASSERT_EQ(got, TileClass::kSkip);
          }
        }
      }
    }
  });
}

TEST(Lengths, AreClampedAndStrided) {
  const int32_t narrow[] = {-5, 3, 99};
  const int64_t wide[] = {7, 0, -1, 0, INT64_MAX, 0};
  const Lengths a{narrow, 1, false}, b{wide, 2, true}, none, shared{narrow + 1, 0, false};
  EXPECT_EQ(a.at(0, 10), 0);
  EXPECT_EQ(a.at(1, 10), 3);
  EXPECT_EQ(a.at(2, 10), 10);
  EXPECT_EQ(b.at(0, 10), 7);
  EXPECT_EQ(b.at(1, 10), 0);
  EXPECT_EQ(b.at(2, 10), 10);
  EXPECT_EQ(none.at(2, 10), 10);
  EXPECT_EQ(shared.at(5, 10), 3);
}

// What kernels read on a device nobody has checked: it stays within the tensors.
TEST(Sequence, LiesWithinTheTensorsWhateverIsRead) {
  const int64_t wild[] = {-7, INT64_MAX, 2};
  const Integers numbers{wild, 1, true};
  Problem packed;
  packed.batch = 2;
  packed.seq_q = packed.seq_kv = 5;
  packed.packing = {numbers, numbers, 9, 8};
  for (int64_t b = 0; b < 2; ++b) {
    const Sequence s = packed.sequence(b);
    EXPECT_TRUE(s.first_query >= 0 && s.seq_q >= 0 && s.first_query + s.seq_q <= 9);
    EXPECT_TRUE(s.first_key >= 0 && s.seq_kv >= 0 && s.first_key + s.seq_kv <= 8);
  }

  // Sequences, and the rows between them, cover every row.
  for (int64_t most : {0, 1, 5}) {
    const int64_t starts[] = {2, 7, 900, 3, -1, 4};
    const SequenceRows rows{{starts, 1, true}, 9, most};
    std::vector<bool> covered(9);
    const auto cover = [&](const SequenceRows::Range& range) {
      EXPECT_TRUE(range.begin >= 0 && range.end <= 9);
      for (int64_t row = range.begin; row < range.end; ++row) covered[size_t(row)] = true;
    };
    for (int64_t b = 0; b < 5; ++b) cover(rows.of(b));
    for (int64_t n = 0; n < 5 + 2; ++n) cover(rows.unowned(n, 5));
    for (size_t row = 0; row < 9; ++row) EXPECT_TRUE(covered[row]) << row;
  }

  Problem cached;
  cached.batch = 3;
  cached.cache.capacity = 10;
  cached.cache.added = 2;
  cached.cache.entries = 4;
  cached.cache.lengths = cached.cache.left_pad = cached.cache.batch = numbers;
  const int64_t entries[] = {0, 3, 2};
  for (int64_t b = 0; b < 3; ++b) {
    const Sequence s = cached.sequence(b);
    EXPECT_EQ(s.key_batch, entries[b]);
    EXPECT_TRUE(s.first_key >= 0 && s.seq_kv >= 0 && s.first_key + s.seq_kv <= 10);
    EXPECT_TRUE(cached.cache.filled(b) >= 0 && cached.cache.end(b) <= 10);
  }
  const PageTable pages{{wild, 0, true}, 1, 4, 6};
  EXPECT_EQ(pages.at(0, 0), 0);
  EXPECT_EQ(pages.at(0, 1), 5);
  EXPECT_EQ(pages.at(0, 2), 2);
}

}  // namespace
}  // namespace fae
