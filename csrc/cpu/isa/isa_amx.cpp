// AMX's tiles of bf16; the other dtypes are left to AVX-512's kernels, and with a compiler that knows no AMX
// all.
#define FAE_ISA_NAMESPACE amx
#include "cpu/isa/prologue.h"

#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11

FAE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")

#include "cpu/kernel/table.h"
#include "cpu/simd/amx.h"

namespace fae::cpu {

const KernelTable& amx_kernels() {
  using namespace amx;
  static constexpr KernelTable table = {{{}, dtype_kernels<AmxProduct, BFloat16>("bf16_tiles"), {}, {}}};
  return table;
}

}  // namespace fae::cpu

FAE_TARGET_END

#else

namespace fae::cpu {

const KernelTable& amx_kernels() {
  static constexpr KernelTable table = {};
  return table;
}

}  // namespace fae::cpu

#endif
