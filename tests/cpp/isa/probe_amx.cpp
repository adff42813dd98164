#define FAE_ISA_NAMESPACE probe_amx
#include "cpu/isa/prologue.h"
#include "probe.h"

FAE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16")

#include "cpu/simd/amx.h"
#include "isa/probe_impl.h"

namespace fae::cpu::probe {

const IsaProbe& amx_probe() {
  using namespace probe_amx;
  static constexpr ProductProbe<float, BFloat16, BFloat16> tiles =
      ProductFunctions<AmxProduct, BFloat16>::table("bf16 tiles");
  static constexpr IsaProbe probe = make_probe(Isa::kAmx, &tiles);
  return probe;
}

}  // namespace fae::cpu::probe

FAE_TARGET_END
