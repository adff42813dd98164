// AVX-512 without the bf16 dot product: 16-bit types are widened while packing.
#define FAE_ISA_NAMESPACE avx512
#include "cpu/isa/prologue.h"

FAE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "cpu/kernel/table.h"
#include "cpu/simd/vec_avx512.h"

namespace fae::cpu {

const KernelTable& avx512_kernels() {
  using namespace avx512;
  static constexpr KernelTable table = {{dtype_kernels<FmaProduct<F32>, Float16>("f32_from_f16"),
                                         dtype_kernels<FmaProduct<F32>, BFloat16>("f32_from_bf16"),
                                         dtype_kernels<FmaProduct<F32>, float>("f32"),
                                         dtype_kernels<FmaProduct<F64>, double>("f64")}};
  return table;
}

}  // namespace fae::cpu

FAE_TARGET_END
