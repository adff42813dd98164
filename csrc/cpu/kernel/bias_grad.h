// Gradient of the additive bias, in the bias's own (broadcast) shape.
//
// Each element sums dS over the axes along which the bias was broadcast. A task owns a
// slice of the result and visits every (batch, head) that shares it in one fixed order,
// so the sum needs no atomics and no tensor larger than the bias.
#pragma once

#include "cpu/kernel/score_grad.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

template <class P, class S>
class BiasGrad : private ScoreGrad<P, S> {
  using Base = ScoreGrad<P, S>;
  using typename Base::Real;
  using typename Base::TileRange;
  using typename Base::V;
  using Base::call_, Base::p_, Base::plan_, Base::arena_, Base::kRows, Base::sequence_;

 public:
  BiasGrad(const BackwardCall& call, const Plan& plan, std::byte* base) : Base(call, plan, base) {
    s_ = arena_.template take<Real>(kRows * plan.block_kv);
    ds_ = arena_.template take<Real>(kRows * plan.block_kv);
    sums_ = arena_.template take<Real>(plan.block_q * plan.block_kv);
  }
  size_t bytes() const { return arena_.used(); }

  // Slices along an axis of the result: one per block, or one where it is broadcast.
  static int64_t blocks(int64_t size, int64_t shape, int64_t block) {
    return shape == 1 && size != 1 ? 1 : (shape + block - 1) / block;
  }
  static int64_t tasks(const BackwardCall& call, const Plan& plan) {
    const int64_t* n = call.dbias_shape;
    return n[0] * n[1] * blocks(call.problem.seq_q, n[2], plan.block_q) *
           blocks(call.problem.seq_kv, n[3], plan.block_kv);
  }

  void run(int64_t task) {
    const int64_t* n = call_.dbias_shape;
    const int64_t key_blocks = blocks(p_.seq_kv, n[3], plan_.block_kv);
    const int64_t query_blocks = blocks(p_.seq_q, n[2], plan_.block_q);
    const int64_t key_block = task % key_blocks;
    const int64_t query_block = task / key_blocks % query_blocks;
    const int64_t head = task / key_blocks / query_blocks % n[1];
    const int64_t batch = task / key_blocks / query_blocks / n[1];
    sum_queries_ = n[2] == 1;
    sum_keys_ = n[3] == 1;
    const KeyRange queries = part(p_.seq_q, sum_queries_, query_block, plan_.block_q);
    const KeyRange keys = part(p_.seq_kv, sum_keys_, key_block, plan_.block_kv);
    for (int64_t i = 0; i < plan_.block_q * plan_.block_kv; ++i) sums_[i] = 0;

    for (int64_t b = n[0] == 1 ? 0 : batch; b < (n[0] == 1 ? p_.batch : batch + 1); ++b) {
      for (int64_t h = n[1] == 1 ? 0 : head; h < (n[1] == 1 ? p_.heads_q : head + 1); ++h) {
        this->set_heads(b, h / p_.group(), h, 1);
        for (int64_t k = keys.begin; k < keys.end; k += plan_.block_kv) add_block(queries, k, keys.end);
      }
    }
    store(batch, head, sum_queries_ ? 0 : queries.begin, sum_queries_ ? 1 : queries.end,
          sum_keys_ ? 0 : keys.begin, sum_keys_ ? 1 : keys.end);
  }

 private:
  static KeyRange part(int64_t size, bool all, int64_t block, int64_t block_size) {
    if (all) return {0, size};
    return {block * block_size, (block + 1) * block_size < size ? (block + 1) * block_size : size};
  }

  void add_block(const KeyRange& queries, int64_t k, int64_t key_limit) {
    int64_t k_end = k + plan_.block_kv < key_limit ? k + plan_.block_kv : key_limit;
    if (k_end > sequence_.kv_length) k_end = sequence_.kv_length;
    if (k >= k_end) return;
    const KeyRange seeing = seeing_queries(sequence_.band, sequence_.seq_q, k, k_end);
    const int64_t begin = seeing.begin > queries.begin ? seeing.begin : queries.begin;
    const int64_t end = seeing.end < queries.end ? seeing.end : queries.end;
    if (begin >= end) return;
    this->load_keys(k, k_end);
    for (int64_t row = begin; row < end; row += plan_.block_q) {
      const int64_t rows_end = row + plan_.block_q < end ? row + plan_.block_q : end;
      this->load_rows(row, rows_end, nullptr);
      for (int64_t r = 0; r < rows_end - row; r += kRows) {
        const int rows = int(rows_end - row - r < kRows ? rows_end - row - r : kRows);
        TileRange range;
        if (!this->compute_tile(r, rows, s_, ds_, plan_.block_kv, false, &range)) continue;
        for (int i = 0; i < rows; ++i) add_row(sum_queries_ ? 0 : row + r + i - queries.begin, i, range);
      }
    }
  }

  void add_row(int64_t sum_row, int i, const TileRange& range) {
    const Real* ds = ds_ + i * plan_.block_kv + range.first;
    if (sum_keys_) {
      auto total = V::zero();
      for (int64_t j = 0; j < range.columns; j += V::kWidth) total = V::add(total, V::load(ds + j));
      sums_[sum_row * plan_.block_kv] += V::reduce_add(total);
      return;
    }
    Real* sums = sums_ + sum_row * plan_.block_kv + range.first;
    for (int64_t j = 0; j < range.columns; j += V::kWidth)
      V::store(sums + j, V::add(V::load(sums + j), V::load(ds + j)));
  }

  void store(int64_t batch, int64_t head, int64_t q_begin, int64_t q_end, int64_t k_begin, int64_t k_end) {
    const View4& dst = call_.dbias;
    for (int64_t i = q_begin; i < q_end; ++i) {
      for (int64_t j = k_begin; j < k_end; ++j) {
        store_from_double(dst.data, p_.score.bias_dtype, dst.offset(batch, head, i) + j * dst.stride[3],
                          double(sums_[(i - q_begin) * plan_.block_kv + j - k_begin]));
      }
    }
  }

  bool sum_queries_ = false, sum_keys_ = false;
  Real* s_;     // [kRows][block_kv]
  Real* ds_;    // [kRows][block_kv]
  Real* sums_;  // [block_q][block_kv]
};

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
