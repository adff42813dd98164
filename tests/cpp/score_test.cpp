// From dot products to scores: one register tile against the per-element definition.
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "attention_case.h"
#include "isa_test.h"

namespace fae::cpu {
namespace {

using probe::Row;
using probe::ScoreProbe;
using probe::Tile;
using testing::Case;
using testing::CaseSpec;
using testing::Extent;

// What the tile must hold for (head, query, key), given the dot product.
double wanted_score(const Case& c, int64_t b, const Row& row, int64_t key, int64_t length, double dot,
                    double* slope) {
  const Problem& p = c.problem;
  const Band& band = p.masking.band;
  *slope = 1;
  if (key < row.query + band.lo || key > row.query + band.hi || key >= length) return -INFINITY;
  const View4& mask = p.masking.mask;
  if (mask.present()) {
    const auto* bytes = static_cast<const uint8_t*>(mask.data);
    if (!bytes[mask.offset(b, row.head, row.query) + key * mask.stride[3]]) return -INFINITY;
  }
  double bias = 0;
  const View4& view = p.score.bias;
  if (view.present()) {
    bias = load_as_double(view.data, p.score.bias_dtype,
                          view.offset(b, row.head, row.query) + key * view.stride[3]);
    if (bias == -INFINITY) return -INFINITY;
  }
  if (p.score.is_plain()) return dot;
  double score = p.score.scale * dot;
  if (p.score.softcap > 0) {
    score = p.score.softcap * std::tanh(score / p.score.softcap);
    *slope = 1 - (score / p.score.softcap) * (score / p.score.softcap);
  }
  return score + bias;
}

FAE_ISA_SUITE(Score);

template <class Real>
void check_finish(const ScoreProbe<Real>& probe, int width, const CaseSpec& spec) {
  SCOPED_TRACE(spec.name);
  const Case c(spec);
  const Problem& p = c.problem;
  std::mt19937 random(4);
  std::normal_distribution<double> normal(0, 3);
  const int64_t b = spec.batch - 1, length = p.masking.kv_lengths.at(b, p.seq_kv);
  for (int rows : {1, 4}) {
    for (int64_t k_begin : {0, 3, 16}) {
      for (int64_t keys : {1, 7, 16, 37}) {
        if (k_begin + keys > spec.seq_kv) continue;
        const int64_t columns = (keys + width - 1) / width * width, ld = columns + 16;
        std::vector<Row> refs;
        for (int r = 0; r < rows; ++r) refs.push_back(probe.row_ref(5 + r, 0, p.group()));
        // A NaN among the dot products: it shows where the key is seen, and nowhere else.
        std::vector<Real> dots(size_t(rows * ld));
        for (Real& x : dots) x = Real(normal(random));
        dots[size_t(keys / 2)] = std::numeric_limits<Real>::quiet_NaN();
        std::vector<Real> s = dots, slope(s.size(), Real(1)), scratch(static_cast<size_t>(ld));
        const Tile<Real> tile{s.data(), ld, k_begin, keys, columns, refs.data(), rows};
        const bool partial = classify(p.masking.band, length, refs.front().query, refs.back().query + 1,
                                      k_begin, k_begin + keys) != TileClass::kFull;
        probe.finish(p, b, partial, p.has_mask(), tile, scratch.data(),
                     spec.softcap > 0 ? slope.data() : nullptr, ld);
        for (int r = 0; r < rows; ++r) {
          for (int64_t j = 0; j < columns; ++j) {
            const size_t at = size_t(r * ld + j);
            double wanted_slope = 1;
            const double wanted = j < keys ? wanted_score(c, b, refs[size_t(r)], k_begin + j, length,
                                                          double(dots[at]), &wanted_slope)
                                           : -INFINITY;
            if (std::isnan(wanted)) {
              ASSERT_TRUE(std::isnan(s[at]));
            } else if (wanted == -INFINITY) {
              ASSERT_EQ(double(s[at]), wanted) << "row " << r << " key " << k_begin + j;
            } else {
              const double epsilon = double(std::numeric_limits<Real>::epsilon());
              ASSERT_NEAR(double(s[at]), wanted, 16 * epsilon * (1 + std::fabs(wanted)))
                  << r << ' ' << k_begin + j;
              if (spec.softcap > 0) {
                ASSERT_NEAR(double(slope[at]), wanted_slope, 16 * epsilon);
              }
            }
          }
          for (int64_t j = columns; j < ld; ++j) {
            const size_t at = size_t(r * ld + j);
            ASSERT_TRUE(s[at] == dots[at]) << "written past the tile";
          }
        }
      }
    }
  }
}

TEST_P(Score, IsThePerElementDefinition) {
  CaseSpec base;
  base.batch = 2;
  base.heads_q = 2;
  base.seq_q = 12;
  base.seq_kv = 60;
  base.dim = base.dim_v = 4;
  std::vector<CaseSpec> specs;
  const auto add = [&](const char* name, auto&& change) {
    CaseSpec s = base;
    s.name = name;
    change(s);
    specs.push_back(s);
  };
  add("plain", [](CaseSpec&) {});
  add("causal", [](CaseSpec& s) { s.causal = Causal::kTopLeft; });
  add("window", [](CaseSpec& s) { s.window_left = 20, s.window_right = 2; });
  add("length", [](CaseSpec& s) { s.kv_lengths = {60, 11}; });
  add("no length", [](CaseSpec& s) { s.kv_lengths = {60, 0}; });
  add("softcap", [](CaseSpec& s) { s.softcap = 2; });
  add("negative scale", [](CaseSpec& s) { s.scale = -1.5; });
  for (Extent e : {Extent::kFull, Extent::kPerBatch, Extent::kRowOnly, Extent::kSingle}) {
    add("mask", [=](CaseSpec& s) { s.mask = e; });
    for (DType t : {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat64}) {
      add("bias", [=](CaseSpec& s) {
        s.bias = e;
        s.bias_dtype = t;
        s.bias_hidden = 0.3;
      });
    }
  }
  add("bias columns apart", [](CaseSpec& s) {
    s.bias = Extent::kFull;
    s.strides = testing::Strides::kColumnsApart;
  });
  add("everything", [](CaseSpec& s) {
    s.bias = Extent::kFull;
    s.mask = Extent::kPerHead;
    s.softcap = 3;
    s.causal = Causal::kBottomRight;
    s.window_left = 30;
    s.kv_lengths = {60, 45};
    s.heads_kv = 1;
  });
  for (const CaseSpec& spec : specs) {
    check_finish(isa().score32, isa().f32.width, spec);
    CaseSpec wide = spec;
    wide.dtype = DType::kFloat64;
    check_finish(isa().score64, isa().f64.width, wide);
  }
}

TEST_P(Score, RowRefsPackHeadsOfAGroup) {
  for (int64_t group : {1, 2, 7}) {
    for (int64_t row = 0; row < 20; ++row) {
      const Row r = isa().score32.row_ref(row, 3, group);
      EXPECT_EQ(r.query, row / group);
      EXPECT_EQ(r.head, 3 * group + row % group);
    }
  }
}

TEST_P(Score, ClassifiesMaskTiles) {
  const int64_t seq_q = 6, seq_kv = 45;
  testing::Guarded<uint8_t> mask(size_t(seq_q * seq_kv));
  std::mt19937 random(8);
  for (int round = 0; round < 300; ++round) {
    // Whole rows of one value, with now and then one exception.
    for (int64_t i = 0; i < seq_q; ++i) memset(mask.data() + i * seq_kv, random() % 2, size_t(seq_kv));
    if (random() % 3 == 0) mask[random() % mask.size()] ^= 1;
    for (int64_t key_stride : {1, 0}) {
      for (int64_t row_stride : {seq_kv, int64_t(0)}) {
        const View4 view{mask.data(), {0, 0, row_stride, key_stride}};
        const int64_t begin = int64_t(random() % uint32_t(seq_kv)),
                      end = begin + 1 + int64_t(random() % uint32_t(seq_kv - begin));
        const Row rows[] = {{0, 1}, {0, 2}, {0, 5}};
        bool any = false, all = true;
        for (const Row& r : rows) {
          for (int64_t j = begin; j < end; ++j) {
            const bool seen = mask[size_t(view.offset(0, 0, r.query) + j * key_stride)];
            any |= seen;
            all &= seen;
          }
        }
        const TileClass wanted = all ? TileClass::kFull : any ? TileClass::kPartial : TileClass::kSkip;
        ASSERT_EQ(isa().score32.classify_mask(view, 0, rows, 3, begin, end), wanted);
      }
    }
  }
}

}  // namespace
}  // namespace fae::cpu
