// Compiles BNEXT_KERNELS, the name of a file of kernels, for x86-64-v4 (AVX-512 F, BW, CD, DQ, VL).
#if defined(__x86_64__)

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

// After the system's headers, before our own: functions that the kernels inline must be compiled for the same
// instruction set, and no others may be.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("arch=x86-64-v4,prfchw"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4", "prfchw", "prefer-vector-width=512")
#endif

#include "../../common/half.h"
#include "../kernels.h"

namespace bnext::cpu::isa_avx512 {
constexpr int kVectorBytes = 64;
#include BNEXT_KERNELS
}  // namespace bnext::cpu::isa_avx512

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
