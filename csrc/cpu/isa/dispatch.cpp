#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <string>

namespace bnext::cpu {
namespace {

constexpr int kIsas = 3;

// Only the tables of available_isas() are filled.
const KernelTable* table_of(Isa isa) {
  static const auto tables = [] {
    struct Tables {
      KernelTable of[kIsas];
    } result = {};
    for (const Isa available : available_isas()) {
      KernelTable& table = result.of[static_cast<int>(available)];
      switch (available) {
        case Isa::kDefault: table = isa_default::kernel_table(); break;
#if defined(__x86_64__)
        case Isa::kAvx2: table = isa_avx2::kernel_table(); break;
        case Isa::kAvx512: table = isa_avx512::kernel_table(); break;
#else
        default: break;
#endif
      }
    }
    return result;
  }();
  return &tables.of[static_cast<int>(isa)];
}

// An unknown or unavailable BNEXT_CPU_ISA leaves the default; `python -m bnext` shows which that is.
Isa initial_isa() {
  const std::vector<Isa> available = available_isas();
  if (const char* wanted = std::getenv("BNEXT_CPU_ISA")) {
    for (const Isa isa : available) {
      if (std::string(wanted) == isa_name(isa)) return isa;
    }
  }
  return available.back();
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kDefault: return "default";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
  }
  __builtin_unreachable();
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas{Isa::kDefault};
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("movbe");
  if (avx2) isas.push_back(Isa::kAvx2);
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) isas.push_back(Isa::kAvx512);
#endif
  return isas;
}

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

void use_isa(Isa isa) { chosen().store(isa, std::memory_order_relaxed); }

const KernelTable& current_kernels() { return *table_of(current_isa()); }

}  // namespace bnext::cpu
