// Chooses the instruction set once, by what the processor reports.
#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/tile_registers.h"

namespace fae::cpu {
namespace {

struct IsaRow {
  Isa isa;
  const char* name;
  bool (*runs_here)();
  const KernelTable& (*kernels)();
};

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_amx() { return has_avx512bf16() && may_use_tile_registers(); }
#endif

// Best first, so that a row's ISA includes those below it; a row stands here exactly when its
// isa/*.cpp is part of the build.
constexpr IsaRow kIsas[] = {
#if defined(__x86_64__)
    {Isa::kAmx, "amx", &has_amx, &amx_kernels},
    {Isa::kAvx512Bf16, "avx512bf16", &has_avx512bf16, &avx512bf16_kernels},
    {Isa::kAvx512, "avx512", &has_avx512, &avx512_kernels},
    {Isa::kAvx2, "avx2", &has_avx2, &avx2_kernels},
#elif defined(__aarch64__)
    {Isa::kNeon, "neon", &always, &neon_kernels},
#endif
    {Isa::kScalar, "scalar", &always, &scalar_kernels},
};

std::string names_of(const std::vector<Isa>& isas) {
  std::string text;
  for (Isa isa : isas) text += (text.empty() ? "" : ", ") + std::string(name_of(isa));
  return text;
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Bf16: return "avx512bf16";
    case Isa::kAmx: return "amx";
    case Isa::kNeon: return "neon";
    default: return "scalar";
  }
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (const IsaRow& row : kIsas) {
    if (row.runs_here()) isas.push_back(row.isa);
  }
  return isas;
}

Isa active_isa() {
  static const std::vector<Isa> available = available_isas();
  const char* wanted = std::getenv("FLASH_ATTN_EXT_CPU_ISA");
  if (!wanted || !*wanted) return available.front();
  for (Isa isa : available) {
    if (std::string(wanted) == name_of(isa)) return isa;
  }
  throw std::invalid_argument("FLASH_ATTN_EXT_CPU_ISA is '" + std::string(wanted) +
                              "', but this machine and build offer: " + names_of(available));
}

const DTypeKernels& kernels_for(Isa isa, DType dtype) {
  bool found = false;
  for (const IsaRow& row : kIsas) {
    found = found || row.isa == isa;
    if (!found) continue;
    const DTypeKernels& kernels = row.kernels().dtype[int(dtype)];
    if (kernels.info.name) return kernels;
  }
  throw std::invalid_argument("no kernels for ISA " + std::string(name_of(isa)));
}

}  // namespace fae::cpu
