// The attention problems that every kernel must solve, small enough for any machine.
#pragma once

#include <vector>

#include "attention_case.h"

namespace fae::testing {

inline CaseSpec shape(const char* name, int64_t batch, int64_t heads_q, int64_t heads_kv, int64_t seq_q,
                      int64_t seq_kv, int64_t dim, int64_t dim_v) {
  CaseSpec s;
  s.name = name;
  s.batch = batch;
  s.heads_q = heads_q;
  s.heads_kv = heads_kv;
  s.seq_q = seq_q;
  s.seq_kv = seq_kv;
  s.dim = dim;
  s.dim_v = dim_v;
  return s;
}

inline const std::vector<CaseSpec>& kernel_cases() {
  static const std::vector<CaseSpec> cases = [] {
    std::vector<CaseSpec> all;
    const auto add = [&](CaseSpec s, auto&& change) {
      change(s);
      all.push_back(s);
    };
    const auto same = [](CaseSpec&) {};
    // Shapes: one element, ragged everywhere, wide heads, decode, more than one key block.
    add(shape("one_element", 1, 1, 1, 1, 1, 1, 1), same);
    add(shape("ragged", 2, 3, 3, 13, 29, 7, 5), same);
    add(shape("dim_64", 1, 2, 2, 50, 70, 64, 64), same);
    add(shape("dim_v_wider", 1, 2, 1, 17, 33, 24, 80), same);
    add(shape("dim_wider", 1, 1, 1, 9, 40, 131, 3), same);
    add(shape("dim_1024", 1, 1, 1, 3, 70, 1024, 1024), same);
    add(shape("decode", 2, 4, 1, 1, 200, 32, 32), same);
    add(shape("group_3", 2, 6, 2, 11, 37, 16, 16), same);
    add(shape("key_blocks", 1, 1, 1, 20, 900, 8, 8), same);
    add(shape("row_blocks", 1, 2, 1, 500, 40, 8, 8), same);
    add(shape("no_keys", 2, 2, 1, 5, 0, 8, 8), same);
    add(shape("no_queries", 2, 2, 1, 0, 5, 8, 8), same);
    add(shape("no_batch", 0, 2, 1, 4, 5, 8, 8), same);
    // Bands.
    for (Causal causal : {Causal::kBottomRight, Causal::kTopLeft}) {
      const bool top = causal == Causal::kTopLeft;
      add(shape(top ? "top_left_square" : "causal_square", 1, 2, 1, 75, 75, 16, 16),
          [=](CaseSpec& s) { s.causal = causal; });
      add(shape(top ? "top_left_wide" : "causal_wide", 1, 2, 2, 19, 83, 16, 16),
          [=](CaseSpec& s) { s.causal = causal; });
      add(shape(top ? "top_left_tall" : "causal_tall", 1, 2, 1, 83, 19, 16, 16),
          [=](CaseSpec& s) { s.causal = causal; });
    }
    add(shape("window", 1, 2, 1, 90, 90, 16, 16), [](CaseSpec& s) { s.window_left = 7, s.window_right = 3; });
    add(shape("window_causal", 2, 4, 2, 60, 100, 16, 16), [](CaseSpec& s) {
      s.causal = Causal::kBottomRight;
      s.window_left = 20;
    });
    add(shape("window_right", 1, 1, 1, 33, 66, 16, 16), [](CaseSpec& s) { s.window_right = 0; });
    add(shape("window_self", 1, 1, 1, 40, 40, 16, 16),
        [](CaseSpec& s) { s.window_left = s.window_right = 0; });
    add(shape("window_nothing", 1, 1, 1, 10, 80, 16, 16), [](CaseSpec& s) {
      s.causal = Causal::kTopLeft;
      s.window_left = 3;
    });
    // Lengths.
    add(shape("lengths", 4, 2, 1, 9, 70, 16, 16), [](CaseSpec& s) { s.kv_lengths = {0, 1, 69, 700}; });
    add(shape("lengths_causal", 3, 2, 1, 70, 70, 16, 16), [](CaseSpec& s) {
      s.kv_lengths = {-3, 33, 64};
      s.int32_lengths = true;
      s.causal = Causal::kBottomRight;
    });
    // Masks and biases of every extent.
    const struct {
      Extent extent;
      const char *mask, *bias;
    } extents[] = {{Extent::kFull, "mask_full", "bias_full"},
                   {Extent::kPerHead, "mask_per_head", "bias_per_head"},
                   {Extent::kPerBatch, "mask_per_batch", "bias_per_batch"},
                   {Extent::kRowOnly, "mask_rows", "bias_rows"},
                   {Extent::kColumnOnly, "mask_columns", "bias_columns"},
                   {Extent::kSingle, "mask_single", "bias_single"}};
    for (const auto& e : extents) {
      add(shape(e.mask, 2, 4, 2, 21, 77, 16, 16), [&](CaseSpec& s) { s.mask = e.extent; });
      add(shape(e.bias, 2, 4, 2, 21, 77, 16, 16), [&](CaseSpec& s) { s.bias = e.extent; });
    }
    add(shape("mask_sparse_causal", 1, 2, 1, 60, 60, 16, 16), [](CaseSpec& s) {
      s.mask = Extent::kFull;
      s.mask_visible = 0.05;
      s.causal = Causal::kBottomRight;
    });
    add(shape("mask_nothing", 1, 1, 1, 8, 40, 16, 16), [](CaseSpec& s) {
      s.mask = Extent::kFull;
      s.mask_visible = 0;
    });
    add(shape("bias_hides", 1, 2, 1, 30, 60, 16, 16), [](CaseSpec& s) {
      s.bias = Extent::kFull;
      s.bias_hidden = 0.5;
    });
    for (DType t : {DType::kFloat16, DType::kBFloat16, DType::kFloat64}) {
      add(shape(t == DType::kFloat16    ? "bias_f16"
                : t == DType::kBFloat16 ? "bias_bf16"
                                        : "bias_f64",
                1, 2, 1, 21, 77, 16, 16),
          [&](CaseSpec& s) {
            s.bias = Extent::kPerHead;
            s.bias_dtype = t;
          });
    }
    // Score modifiers.
    add(shape("softcap", 1, 2, 1, 30, 60, 16, 16), [](CaseSpec& s) { s.softcap = 1.5; });
    add(shape("softcap_bias_mask_causal", 2, 2, 1, 40, 60, 16, 16), [](CaseSpec& s) {
      s.softcap = 3;
      s.bias = Extent::kPerHead;
      s.mask = Extent::kPerBatch;
      s.causal = Causal::kBottomRight;
    });
    add(shape("scale_0", 1, 1, 1, 9, 50, 16, 16), [](CaseSpec& s) { s.scale = 0.0; });
    add(shape("scale_negative", 1, 1, 1, 9, 50, 16, 16), [](CaseSpec& s) { s.scale = -0.5; });
    add(shape("scale_large", 1, 1, 1, 9, 50, 16, 16), [](CaseSpec& s) { s.scale = 4.0; });
    // Memory.
    for (Layout layout : {Layout::kBshd, Layout::kBhsd}) {
      const bool heads_first = layout == Layout::kBhsd;
      add(shape(heads_first ? "bhsd_columns_apart" : "bshd_columns_apart", 2, 4, 2, 14, 40, 17, 19),
          [=](CaseSpec& s) {
            s.layout = layout;
            s.strides = Strides::kColumnsApart;
            s.bias = Extent::kFull;
          });
      add(shape(heads_first ? "bhsd_rows_apart" : "bshd_rows_apart", 2, 4, 2, 14, 40, 17, 19),
          [=](CaseSpec& s) {
            s.layout = layout;
            s.strides = Strides::kRowsApart;
          });
    }
    add(shape("broadcast_kv", 3, 4, 2, 14, 40, 17, 19),
        [](CaseSpec& s) { s.strides = Strides::kBroadcastKv; });
    for (CaseSpec& s : all) s.dlse = s.heads_q > 1;
    return all;
  }();
  return cases;
}

}  // namespace fae::testing
