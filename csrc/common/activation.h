// The activations that batch norm applies on the way out, and their slopes. One copy for every device: V is a scalar or
// a SIMD vector of float or double.
//
// float32 uses the polynomials below, good to an ulp or two; float64 the C library, a lane at a time.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "inline.h"

namespace bnext {

enum class Act : std::uint8_t { kIdentity, kRelu, kLeakyRelu, kSilu, kGelu, kHardswish };

struct Activation {
  Act act = Act::kIdentity;
  double slope = 0.0;  // kLeakyRelu, for negative values

  // Whether the sign of the pre-activation is all that its slope depends on.
  BNEXT_INLINE constexpr bool rectifies() const { return act == Act::kRelu || act == Act::kLeakyRelu; }
};

// The type of V's lanes, and signed integers as wide as V's.
template <typename V>
struct LanesOf {
  using Scalar = std::remove_cv_t<std::remove_reference_t<decltype(V{}[0])>>;
  using Bits = decltype(V{} < V{});
};
template <>
struct LanesOf<float> {
  using Scalar = float;
  using Bits = std::int32_t;
};
template <>
struct LanesOf<double> {
  using Scalar = double;
  using Bits = std::int64_t;
};
template <typename V>
using scalar_of = typename LanesOf<V>::Scalar;

template <typename V, typename F>
BNEXT_INLINE V lane_by_lane(const V& x, F&& f) {
  if constexpr (std::is_same_v<V, scalar_of<V>>) {
    return f(x);
  } else {
    V result = x;
    for (int l = 0; l < static_cast<int>(sizeof(V) / sizeof(scalar_of<V>)); ++l) result[l] = f(x[l]);
    return result;
  }
}

template <typename V>
BNEXT_INLINE V clamp(const V& x, scalar_of<V> low, scalar_of<V> high) {
  return x < low ? V{} + low : x > high ? V{} + high : x;
}

// e^x for x that is not above 0; 0 below -87.
template <typename V>
BNEXT_INLINE V exponential(const V& x) {
  if constexpr (std::is_same_v<scalar_of<V>, double>) {
    return lane_by_lane(x, [](double lane) { return std::exp(lane); });
  } else {
    using Bits = typename LanesOf<V>::Bits;
    constexpr float kLow = -87.0f;
    const V inside = x < kLow ? V{} + kLow : x;
    // x = n*ln(2) + r with |r| <= ln(2)/2. Adding 1.5*2^23 rounds to a whole number and leaves it in the low bits. The
    // first part of ln(2) has so few bits that n times it is exact.
    constexpr float kRound = 12582912.0f;
    const V shifted = inside * 1.44269504f + kRound;
    const V n = shifted - kRound;
    const V r = (inside - n * 0.693359375f) - n * -2.12194440e-4f;
    // e^r = 1 + r + r^2*(...), relative error 3e-9: least squares on Chebyshev points, reweighted to the maximum.
    const V p = (((r * 1.3814466e-3f + 8.3687805e-3f) * r + 4.1668394e-2f) * r + 1.66665201e-1f) * r + 4.99999934e-1f;
    const V e = (r * r) * p + r + 1.0f;
    const V scaled = __builtin_bit_cast(V, __builtin_bit_cast(Bits, e) + (__builtin_bit_cast(Bits, shifted) << 23));
    // A NaN's bits do not survive the scaling.
    return x < kLow ? V{} : x == x ? scaled : x;
  }
}

// The logistic function at z and at -z, the smaller of which is not taken as 1 minus the larger.
template <typename V>
struct Logistic {
  V at;
  V opposite;

  BNEXT_INLINE explicit Logistic(const V& z) {
    using T = scalar_of<V>;
    constexpr T kZero = 0;
    constexpr T kOne = 1;
    const V e = exponential(z < kZero ? z : -z);
    const V larger = kOne / (e + kOne);
    const V smaller = e * larger;
    at = z < kZero ? smaller : larger;
    opposite = z < kZero ? larger : smaller;
  }
};

// The normal distribution: its density at z, and the probability of a value below z, with relative accuracy in the
// tail too, where 1 + erf(z/sqrt(2)) cancels.
template <typename V>
struct Normal {
  V density;
  V below;

  BNEXT_INLINE explicit Normal(const V& z) {
    using T = scalar_of<V>;
    const V e = exponential(z * z * static_cast<T>(-0.5));
    density = e * static_cast<T>(0.39894228040143268);
    if constexpr (std::is_same_v<T, double>) {
      below = lane_by_lane(z, [](double lane) { return 0.5 * std::erfc(lane * -0.70710678118654752); });
    } else {
      // The tail beyond |z| is e^(-z^2/2)*v*P(v) with v = 1/(1 + 0.26*|z|), relative error 2.5e-8; fitted as above.
      const V distance = z < 0.0f ? -z : z;
      const V v = 1.0f / (distance * 0.26f + 1.0f);
      V p = v * 3.05049418e-2f - 1.52829101e-1f;
      p = p * v + 2.51491857e-1f;
      p = p * v - 1.50949605e-1f;
      p = p * v + 1.60948290e-1f;
      p = p * v + 5.10275021e-2f;
      p = p * v + 1.03030298e-1f;
      p = p * v + 1.03016745e-1f;
      p = p * v + 1.03759060e-1f;
      const V tail = e * v * p;
      below = z > 0.0f ? 1.0f - tail : tail;
    }
  }
};

// What a rectifier makes of z: `open` above zero, and for a NaN; else `closed`.
template <typename V>
BNEXT_INLINE V rectified(const V& z, const V& open, const V& closed) {
  return z <= static_cast<scalar_of<V>>(0) ? closed : open;
}

// act(z)
template <typename V>
BNEXT_INLINE V activate(const Activation& a, const V& z) {
  using T = scalar_of<V>;
  switch (a.act) {
    case Act::kIdentity: return z;
    case Act::kRelu: return rectified(z, z, V{});
    case Act::kLeakyRelu: return rectified(z, z, z * static_cast<T>(a.slope));
    case Act::kSilu: return z * Logistic<V>(z).at;
    case Act::kGelu: return z * Normal<V>(z).below;
    case Act::kHardswish: return z * (clamp<V>(z + static_cast<T>(3), 0, 6) * static_cast<T>(1.0 / 6.0));
  }
  __builtin_unreachable();
}

// dy * act'(z)
template <typename V>
BNEXT_INLINE V activation_grad(const Activation& a, const V& z, const V& dy) {
  using T = scalar_of<V>;
  constexpr T kOne = 1;
  switch (a.act) {
    case Act::kIdentity: return dy;
    case Act::kRelu: return rectified(z, dy, V{});
    case Act::kLeakyRelu: return rectified(z, dy, dy * static_cast<T>(a.slope));
    case Act::kSilu: {
      const Logistic<V> logistic(z);
      return dy * (logistic.at * (z * logistic.opposite + kOne));
    }
    case Act::kGelu: {
      const Normal<V> normal(z);
      return dy * (z * normal.density + normal.below);
    }
    case Act::kHardswish: {
      const V inside = dy * (z * static_cast<T>(1.0 / 3.0) + static_cast<T>(0.5));
      return z <= static_cast<T>(-3) ? V{} : z >= static_cast<T>(3) ? dy : inside;
    }
  }
  __builtin_unreachable();
}

}  // namespace bnext
