// The baseline of the architecture; everywhere, and the last resort.
#define FAE_ISA_NAMESPACE scalar
#include "cpu/isa/prologue.h"
#include "cpu/kernel/table.h"
#include "cpu/simd/vec_scalar.h"

namespace fae::cpu {

const KernelTable& scalar_kernels() {
  using namespace scalar;
  static constexpr KernelTable table = {{dtype_kernels<FmaProduct<F32>, Float16>("f32_from_f16"),
                                         dtype_kernels<FmaProduct<F32>, BFloat16>("f32_from_bf16"),
                                         dtype_kernels<FmaProduct<F32>, float>("f32"),
                                         dtype_kernels<FmaProduct<F64>, double>("f64")}};
  return table;
}

}  // namespace fae::cpu
