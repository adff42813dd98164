// The attention problems of extended calls: sinks, ALiBi, dropout, typed masks, packed sequences, alone and
// together.
#pragma once

#include <vector>

#include "kernel_cases.h"

namespace fae::testing {

inline const std::vector<CaseSpec>& extended_cases() {
  static const std::vector<CaseSpec> cases = [] {
    std::vector<CaseSpec> all;
    const auto add = [&](CaseSpec s, auto&& change) {
      change(s);
      s.dlse = s.heads_q > 1;
      all.push_back(s);
    };
    add(shape("sinks", 2, 4, 2, 21, 77, 16, 16), [](CaseSpec& s) { s.sinks = true; });
    add(shape("sinks_without_keys", 2, 4, 2, 21, 9, 16, 16), [](CaseSpec& s) {
      s.sinks = true;
      s.causal = Causal::kBottomRight;
    });
    add(shape("sinks_mask", 1, 2, 1, 30, 60, 16, 16), [](CaseSpec& s) {
      s.sinks = true;
      s.mask = Extent::kFull;
      s.mask_visible = 0.05;
    });
    add(shape("sinks_window_nothing", 1, 2, 1, 10, 80, 16, 16), [](CaseSpec& s) {
      s.sinks = true;
      s.causal = Causal::kTopLeft;
      s.window_left = 3;
    });
    add(shape("alibi", 2, 4, 2, 21, 77, 16, 16), [](CaseSpec& s) { s.alibi = true; });
    add(shape("alibi_per_batch", 2, 4, 2, 40, 40, 16, 16), [](CaseSpec& s) {
      s.alibi = s.alibi_per_batch = true;
      s.causal = Causal::kBottomRight;
    });
    add(shape("alibi_softcap_bias", 2, 2, 1, 40, 60, 16, 16), [](CaseSpec& s) {
      s.alibi = true;
      s.softcap = 3;
      s.bias = Extent::kPerHead;
      s.causal = Causal::kTopLeft;
    });
    add(shape("dropout", 2, 4, 2, 21, 77, 16, 16), [](CaseSpec& s) { s.dropout_p = 0.3; });
    add(shape("dropout_causal", 1, 2, 1, 75, 130, 16, 16), [](CaseSpec& s) {
      s.dropout_p = 0.8;
      s.causal = Causal::kBottomRight;
    });
    for (const auto& [visible, name] : {std::pair{0.7, "blocks"}, std::pair{0.3, "blocks_few"}}) {
      add(shape(name, 2, 4, 2, 50, 77, 16, 16), [visible = visible](CaseSpec& s) {
        s.mask = Extent::kFull;
        s.mask_visible = visible;
        s.mask_block_q = 16;
        s.mask_block_kv = 20;
      });
    }
    add(shape("blocks_odd", 1, 2, 1, 33, 100, 16, 16), [](CaseSpec& s) {
      s.mask = Extent::kPerHead;
      s.mask_block_q = 5;
      s.mask_block_kv = 3;
      s.causal = Causal::kBottomRight;
    });
    add(shape("intervals", 2, 4, 2, 50, 77, 16, 16), [](CaseSpec& s) { s.intervals = 1; });
    add(shape("intervals_two", 2, 2, 1, 60, 200, 16, 16), [](CaseSpec& s) {
      s.intervals = 2;
      s.causal = Causal::kTopLeft;
    });
    const auto packed = [](CaseSpec& s) {
      s.batch = 5;
      s.starts_q = {0, 13, 13, 60, 61, 100};
      s.starts_kv = {0, 29, 40, 40, 140, 185};
      s.seq_q = 47;
      s.seq_kv = 100;
    };
    add(shape("packed", 1, 4, 2, 1, 1, 16, 24), packed);
    add(shape("packed_causal", 1, 2, 1, 1, 1, 16, 16), [&](CaseSpec& s) {
      packed(s);
      s.causal = Causal::kBottomRight;
      s.window_left = 12;
    });
    add(shape("packed_everything", 1, 4, 2, 1, 1, 16, 16), [&](CaseSpec& s) {
      packed(s);
      s.causal = Causal::kTopLeft;
      s.softcap = 2;
      s.alibi = s.alibi_per_batch = s.sinks = true;
      s.dropout_p = 0.25;
      s.intervals = 1;
      s.bias = Extent::kPerBatch;
      s.mask = Extent::kFull;
      s.kv_lengths = {3, 29, 40, 99, 200};
    });
    add(shape("packed_masks", 1, 6, 2, 1, 1, 24, 40), [&](CaseSpec& s) {
      packed(s);
      s.causal = Causal::kBottomRight;
      s.softcap = 2;
      s.intervals = 2;
      s.bias = Extent::kPerBatch;
      s.mask = Extent::kFull;
      s.mask_visible = 0.8;
      s.mask_block_q = 11;
      s.mask_block_kv = 30;
      s.kv_lengths = {3, 29, 40, 99, 200};
    });
    add(shape("packed_tiles", 1, 3, 1, 1, 1, 16, 16), [](CaseSpec& s) {
      s.batch = 3;
      s.starts_q = {0, 90, 93, 225};
      s.starts_kv = {0, 140, 143, 240};
      s.seq_q = 132;
      s.seq_kv = 140;
      s.causal = Causal::kTopLeft;
      s.mask = Extent::kFull;
      s.mask_visible = 0.4;
      s.mask_block_q = 32;
      s.mask_block_kv = 64;
    });
    add(shape("everything", 2, 6, 2, 31, 67, 24, 40), [](CaseSpec& s) {
      s.causal = Causal::kBottomRight;
      s.window_left = 40;
      s.softcap = 2;
      s.alibi = s.sinks = true;
      s.dropout_p = 0.5;
      s.intervals = 1;
      s.bias = Extent::kRowOnly;
      s.mask = Extent::kFull;
      s.mask_block_q = 7;
      s.mask_block_kv = 9;
      s.kv_lengths = {67, 30};
    });
    // Few rows: several heads through the keys together, by ranges of keys; masks, hidden ends, values of
    // 1024.
    for (Layout layout : {Layout::kBshd, Layout::kBhsd}) {
      const bool heads_first = layout == Layout::kBhsd;
      add(shape(heads_first ? "decode_heads_bhsd" : "decode_heads", 2, 6, 3, 1, 2300, 24, 40),
          [=](CaseSpec& s) {
            s.layout = layout;
            s.sinks = true;
          });
      add(shape(heads_first ? "decode_all_bhsd" : "decode_all", 1, 6, 3, 3, 2200, 16, 72), [=](CaseSpec& s) {
        s.layout = layout;
        s.causal = Causal::kBottomRight;
        s.alibi = s.sinks = true;
        s.dropout_p = 0.2;
        s.intervals = 1;
        s.mask = Extent::kPerBatch;
        s.kv_lengths = {1100};
      });
    }
    add(shape("decode_wide", 1, 7, 1, 1, 150, 129, 131), [](CaseSpec& s) { s.window_left = 100; });
    add(shape("decode_packed", 1, 4, 2, 1, 1, 16, 24), [](CaseSpec& s) {
      s.batch = 4;
      s.starts_q = {0, 1, 1, 3, 4};
      s.starts_kv = {0, 70, 90, 1400, 1400};
      s.seq_q = 2;
      s.seq_kv = 1310;
      s.sinks = true;
      s.causal = Causal::kBottomRight;
    });
    // Several blocks of keys, rows in chunks.
    add(shape("chunks", 1, 2, 1, 420, 410, 16, 24), [](CaseSpec& s) {
      s.causal = Causal::kBottomRight;
      s.alibi = s.sinks = true;
      s.dropout_p = 0.1;
      s.intervals = 1;
    });
    return all;
  }();
  return cases;
}

}  // namespace fae::testing
