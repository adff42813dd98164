// Which query a packed row is, and the type of its log-sum-exp.
#pragma once

#include "core/problem.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

// One packed query row (see Problem::packed_rows).
struct RowRef {
  int64_t head;   // query head
  int64_t query;  // position in seq_q
};

inline RowRef row_ref(int64_t row, int64_t head_kv, int64_t group) {
  if (group == 1) return {head_kv, row};  // divisions show in small problems
  const int64_t query = row / group;
  return {head_kv * group + (row - query * group), query};
}

template <class A, class B> constexpr bool kSameType = false;
template <class A> constexpr bool kSameType<A, A> = true;

// The C++ type of lse_dtype().
template <class S> struct LseType { using Type = float; };
template <> struct LseType<float> { using Type = double; };
template <> struct LseType<double> { using Type = double; };

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
