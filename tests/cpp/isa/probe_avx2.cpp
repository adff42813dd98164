#define FAE_ISA_NAMESPACE probe_avx2
#include "cpu/isa/prologue.h"
#include "probe.h"

FAE_TARGET_BEGIN("avx2,fma,f16c")

#include "cpu/simd/vec_avx2.h"
#include "isa/probe_impl.h"

namespace fae::cpu::probe {

const IsaProbe& avx2_probe() {
  static constexpr IsaProbe probe = probe_avx2::make_probe(Isa::kAvx2, nullptr);
  return probe;
}

}  // namespace fae::cpu::probe

FAE_TARGET_END
