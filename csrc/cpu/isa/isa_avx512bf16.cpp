// AVX-512 with the bf16 dot product; the other dtypes are left to AVX-512's kernels.
#define FAE_ISA_NAMESPACE avx512bf16
#include "cpu/isa/prologue.h"

FAE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

#include "cpu/kernel/table.h"
#include "cpu/simd/bf16_dot.h"

namespace fae::cpu {

const KernelTable& avx512bf16_kernels() {
  using namespace avx512bf16;
  static constexpr KernelTable table = {{{}, dtype_kernels<Bf16DotProduct, BFloat16>("bf16_dot"), {}, {}}};
  return table;
}

}  // namespace fae::cpu

FAE_TARGET_END
