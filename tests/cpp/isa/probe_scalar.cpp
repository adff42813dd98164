#define FAE_ISA_NAMESPACE probe_scalar
#include "cpu/isa/prologue.h"
#include "probe.h"

#include "cpu/simd/vec_scalar.h"
#include "isa/probe_impl.h"

namespace fae::cpu::probe {

const IsaProbe& scalar_probe() {
  static constexpr IsaProbe probe = probe_scalar::make_probe(Isa::kScalar, nullptr);
  return probe;
}

}  // namespace fae::cpu::probe
