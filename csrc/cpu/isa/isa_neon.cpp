// NEON, which every aarch64 processor has: 16-bit types are widened while packing.
#define FAE_ISA_NAMESPACE neon
#include "cpu/isa/prologue.h"
#include "cpu/kernel/table.h"
#include "cpu/simd/vec_neon.h"

namespace fae::cpu {

const KernelTable& neon_kernels() {
  using namespace neon;
  static constexpr KernelTable table = {{dtype_kernels<FmaProduct<F32>, Float16>("f32_from_f16"),
                                         dtype_kernels<FmaProduct<F32>, BFloat16>("f32_from_bf16"),
                                         dtype_kernels<FmaProduct<F32>, float>("f32"),
                                         dtype_kernels<FmaProduct<F64>, double>("f64")}};
  return table;
}

}  // namespace fae::cpu
