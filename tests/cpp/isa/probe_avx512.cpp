#define FAE_ISA_NAMESPACE probe_avx512
#include "cpu/isa/prologue.h"
#include "probe.h"

FAE_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#include "cpu/simd/vec_avx512.h"
#include "isa/probe_impl.h"

namespace fae::cpu::probe {

const IsaProbe& avx512_probe() {
  static constexpr IsaProbe probe = probe_avx512::make_probe(Isa::kAvx512, nullptr);
  return probe;
}

}  // namespace fae::cpu::probe

FAE_TARGET_END
