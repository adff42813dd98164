#define FAE_ISA_NAMESPACE probe_avx512bf16
#include "cpu/isa/prologue.h"
#include "probe.h"

FAE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")

#include "cpu/simd/bf16_dot.h"
#include "isa/probe_impl.h"

namespace fae::cpu::probe {

const IsaProbe& avx512bf16_probe() {
  using namespace probe_avx512bf16;
  static constexpr ProductProbe<float, BFloat16, BFloat16> bf16_dot =
      ProductFunctions<Bf16DotProduct, BFloat16>::table("bf16 dot");
  static constexpr IsaProbe probe = make_probe(Isa::kAvx512Bf16, &bf16_dot);
  return probe;
}

}  // namespace fae::cpu::probe

FAE_TARGET_END
