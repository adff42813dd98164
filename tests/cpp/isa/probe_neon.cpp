#define FAE_ISA_NAMESPACE probe_neon
#include "cpu/isa/prologue.h"
#include "probe.h"

#include "cpu/simd/vec_neon.h"
#include "isa/probe_impl.h"

namespace fae::cpu::probe {

const IsaProbe& neon_probe() {
  static constexpr IsaProbe probe = probe_neon::make_probe(Isa::kNeon, nullptr);
  return probe;
}

}  // namespace fae::cpu::probe
