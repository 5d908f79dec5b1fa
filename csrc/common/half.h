// Half-precision formats as bit patterns, converted by integer arithmetic.
//
// Each conversion is a template over the register type, so that one copy serves a scalar (std::uint32_t) and a
// SIMD vector of them: comparisons yield a bool or a lane mask, and `mask ? a : b` means a select in both.
#pragma once

#include <cstdint>

#include "inline.h"

namespace bnext {

struct Half {
  std::uint16_t bits;
};

struct BFloat16 {
  std::uint16_t bits;
};

// F and U: float and std::uint32_t, or vectors of them with the same number of lanes.
template <typename F, typename U>
BNEXT_INLINE F bfloat16_to_float(U bits) {
  return __builtin_bit_cast(F, bits << 16);
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN of the same sign. The result is in the upper 16 bits; the
// lower 16 are to be ignored.
template <typename U, typename F>
BNEXT_INLINE U round_to_bfloat16(F value) {
  const U bits = __builtin_bit_cast(U, value);
  const U rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return value != value ? bits | 0x400000u : rounded;
}

template <typename U, typename F>
BNEXT_INLINE U float_to_bfloat16(F value) {
  return round_to_bfloat16<U>(value) >> 16;
}

template <typename F, typename U>
BNEXT_INLINE F float16_to_float(U bits) {
  const U magnitude = bits & 0x7fffu;
  // Moving the exponent field up by 13 bits leaves it 112 too small; the multiplication corrects it exactly, and
  // normalises a subnormal half, too.
  const F scaled = __builtin_bit_cast(F, magnitude << 13) * 0x1p112f;
  const U finite = __builtin_bit_cast(U, scaled);
  const U result = magnitude >= 0x7c00u ? finite | 0x7f800000u : finite;
  return __builtin_bit_cast(F, result | ((bits & 0x8000u) << 16));
}

// Round to nearest, ties to even, overflow to infinity, gradual underflow.
template <typename U, typename F>
BNEXT_INLINE U float_to_float16(F value) {
  const U bits = __builtin_bit_cast(U, value);
  const U sign = (bits >> 16) & 0x8000u;
  const U magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5 puts the half's last bit at the float's, which rounds.
  const U subnormal = __builtin_bit_cast(U, __builtin_bit_cast(F, magnitude) + 0.5f) - 0x3f000000u;
  const U normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;  // 0xc8000000 = (15 - 127) << 23
  const U finite = magnitude < 0x38800000u ? subnormal : normal;
  const U special = magnitude > 0x7f800000u ? (magnitude & 0u) + 0x7e00u : (magnitude & 0u) + 0x7c00u;
  return (magnitude >= 0x47800000u ? special : finite) | sign;
}

BNEXT_INLINE float to_float(Half h) { return float16_to_float<float>(std::uint32_t{h.bits}); }
BNEXT_INLINE float to_float(BFloat16 b) { return bfloat16_to_float<float>(std::uint32_t{b.bits}); }

// An element of any type as a double; from_double is the inverse, and rounds to half precision through float32.
template <typename T>
BNEXT_INLINE double to_double(T value) {
  if constexpr (sizeof(T) == sizeof(std::uint16_t)) {
    return to_float(value);
  } else {
    return value;
  }
}

BNEXT_INLINE Half to_half(float value) { return {static_cast<std::uint16_t>(float_to_float16<std::uint32_t>(value))}; }
BNEXT_INLINE BFloat16 to_bfloat16(float value) {
  return {static_cast<std::uint16_t>(float_to_bfloat16<std::uint32_t>(value))};
}

BNEXT_INLINE void from_double(double value, double& to) { to = value; }
BNEXT_INLINE void from_double(double value, float& to) { to = static_cast<float>(value); }
BNEXT_INLINE void from_double(double value, Half& to) { to = to_half(static_cast<float>(value)); }
BNEXT_INLINE void from_double(double value, BFloat16& to) { to = to_bfloat16(static_cast<float>(value)); }

}  // namespace bnext
