// Compiles BNEXT_KERNELS, the name of a file of kernels, for the processor's baseline: SSE2 on x86-64, Neon on aarch64.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../../common/half.h"
#include "../kernels.h"

namespace bnext::cpu::isa_default {
constexpr int kVectorBytes = 16;
#include BNEXT_KERNELS
}  // namespace bnext::cpu::isa_default
