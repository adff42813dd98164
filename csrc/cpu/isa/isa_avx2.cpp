// AVX2 with FMA and F16C: 16-bit types are widened while packing.
#define FAE_ISA_NAMESPACE avx2
#include "cpu/isa/prologue.h"

FAE_TARGET_BEGIN("avx2,fma,f16c")

#include "cpu/kernel/table.h"
#include "cpu/simd/vec_avx2.h"

namespace fae::cpu {

const KernelTable& avx2_kernels() {
  using namespace avx2;
  static constexpr KernelTable table = {{dtype_kernels<FmaProduct<F32>, Float16>("f32_from_f16"),
                                         dtype_kernels<FmaProduct<F32>, BFloat16>("f32_from_bf16"),
                                         dtype_kernels<FmaProduct<F32>, float>("f32"),
                                         dtype_kernels<FmaProduct<F64>, double>("f64")}};
  return table;
}

}  // namespace fae::cpu

FAE_TARGET_END
