// The functions of one ISA, as the rows of its KernelTable.
#pragma once

#include "cpu/kernel/backward.h"
#include "cpu/kernel/backward_direct.h"
#include "cpu/kernel/bias_grad.h"
#include "cpu/kernel/decode.h"
#include "cpu/kernel/forward.h"
#include "cpu/kernel/log_sum.h"
#include "cpu/kernel_table.h"

namespace fae::cpu::FAE_ISA_NAMESPACE {

template <class P, class S>
size_t forward_workspace(const ForwardCall& call, const Plan& plan) {
  return plan.direct ? Decode<P, S>(call, plan, nullptr).bytes() : Forward<P, S>(call, plan, nullptr).bytes();
}
template <class P, class S>
void forward_task(const ForwardCall& call, const Plan& plan, int64_t task, std::byte* parts,
                  std::byte* workspace) {
  if (plan.direct) return Decode<P, S>(call, plan, workspace).run(task, parts);
  const typename P::Session session;
  Forward<P, S>(call, plan, workspace).run(task);
}

template <class P, class S>
struct BackwardFunctions {
  using Real = typename P::Vec::Elem;
  static size_t workspace(const BackwardCall& call, const Plan& plan) {
    return plan.direct ? DirectBackward<P, S>(call, plan, nullptr).bytes()
                       : Backward<P, S>(call, plan, nullptr).bytes();
  }
  static size_t dq_bytes(const Problem& p) { return size_t(Backward<P, S>::dq_size(p)) * sizeof(Real); }
  static size_t dkv_bytes(const Problem& p, const Plan& plan) {
    return size_t(Backward<P, S>::dkv_size(p, plan)) * sizeof(Real);
  }
  static void run_head(const BackwardCall& call, const Plan& plan, int64_t unit, std::byte* workspace) {
    if (plan.direct) return DirectBackward<P, S>(call, plan, workspace).run_head(unit);
    const typename P::Session session;
    Backward<P, S>(call, plan, workspace).run_head(unit);
  }
  static bool run_chunk(const BackwardCall& call, const Plan& plan, int64_t unit, int64_t chunk, int64_t k,
                        std::byte* dq, std::byte* workspace) {
    const typename P::Session session;
    return Backward<P, S>(call, plan, workspace).run_chunk(unit, chunk, k, reinterpret_cast<Real*>(dq));
  }
  static void merge_keys(const BackwardCall& call, const Plan& plan, int64_t unit, int64_t chunk, int64_t k,
                         bool any, std::byte* dkv, std::byte* workspace) {
    Backward<P, S>(call, plan, workspace).merge_keys(unit, chunk, k, any, reinterpret_cast<Real*>(dkv));
  }
};

template <class P, class S>
struct BiasGradFunctions {
  static size_t workspace(const BackwardCall& call, const Plan& plan) {
    return BiasGrad<P, S>(call, plan, nullptr).bytes();
  }
  static int64_t tasks(const BackwardCall& call, const Plan& plan) {
    return BiasGrad<P, S>::tasks(call, plan);
  }
  static void run(const BackwardCall& call, const Plan& plan, int64_t task, std::byte* workspace) {
    const typename P::Session session;
    BiasGrad<P, S>(call, plan, workspace).run(task);
  }
};

template <class P, class S>
struct LogSumFunctions {
  static bool needed(const BackwardCall& call) { return LogSum<P, S>::needed(call); }
  static size_t workspace(const BackwardCall& call, const Plan& plan) {
    return LogSum<P, S>(call, plan, nullptr).bytes();
  }
  static int64_t tasks(const BackwardCall& call, const Plan& plan) { return LogSum<P, S>::tasks(call, plan); }
  static void run(const BackwardCall& call, const Plan& plan, int64_t task, std::byte* workspace) {
    const typename P::Session session;
    LogSum<P, S>(call, plan, workspace).run(task);
  }
};

template <class P, class S>
constexpr DTypeKernels dtype_kernels(const char* name) {
  using V = typename P::Vec;
  using B = BackwardFunctions<P, S>;
  using D = BiasGradFunctions<P, S>;
  using L = LogSumFunctions<P, S>;
  return {
      {name, int(sizeof(typename P::Operand)), int(sizeof(typename V::Elem)), P::kTileRows, int(kPanel<P>)},
      {&forward_workspace<P, S>, &forward_task<P, S>},
      {&B::workspace, &B::dq_bytes, &B::dkv_bytes, &B::run_head, &B::run_chunk, &B::merge_keys},
      {&D::workspace, &D::tasks, &D::run},
      {&L::needed, &L::workspace, &L::tasks, &L::run}};
}

}  // namespace fae::cpu::FAE_ISA_NAMESPACE
