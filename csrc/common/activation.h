// The activations that can follow batch norm, and their derivatives. One copy for every device: V is a scalar or a SIMD
// vector of float or double.
//
// float32 uses the polynomials below; float64 the C library, a lane at a time.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "inline.h"

namespace bnext {

enum class Act : std::int32_t { kIdentity, kRelu, kRelu6, kLeakyRelu, kSilu, kGelu, kHardswish, kMish, kElu };

// As users name them.
struct NamedAct {
  const char* name;
  Act act;
};
inline constexpr NamedAct kActs[] = {{"identity", Act::kIdentity},    {"relu", Act::kRelu}, {"relu6", Act::kRelu6},
                                     {"leaky_relu", Act::kLeakyRelu}, {"silu", Act::kSilu}, {"gelu", Act::kGelu},
                                     {"hardswish", Act::kHardswish},  {"mish", Act::kMish}, {"elu", Act::kElu}};
inline constexpr unsigned kActCount = sizeof kActs / sizeof kActs[0];

constexpr bool acts_are_in_order() {
  for (unsigned i = 0; i < kActCount; ++i) {
    if (kActs[i].act != static_cast<Act>(i)) return false;
  }
  return true;
}
static_assert(acts_are_in_order(), "kActCount bounds the values of Act");

struct Activation {
  Act act = Act::kIdentity;
  double slope = 0.0;  // kLeakyRelu: for negative values; kElu: just below zero, which is its alpha

  // Whether its derivative takes two values, which one bit tells apart: the rectifier is open, or closed.
  BNEXT_INLINE constexpr bool rectifies() const {
    return act == Act::kRelu || act == Act::kRelu6 || act == Act::kLeakyRelu;
  }
};

// The type of V's lanes; and signed integers of their width, as many as V has lanes.
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

// The format that results of float32 polynomials are rounded to; for fewer digits shorter polynomials suffice. All are
// least-squares fits on Chebyshev points, reweighted to minimise the largest error.
enum class Digits { kFloat32, kFloat16, kBFloat16 };

// 2^x = 2^n*(1 + quotient*f) for |x| <= 126 and x = z*(unit + low), where `low` is what the float `unit` lacks.
template <Digits kDigits, typename V>
struct PowerOfTwo {
  using Bits = typename LanesOf<V>::Bits;

  V f;         // x - n, |f| <= 1/2
  V quotient;  // (2^f - 1)/f
  Bits n;      // in a float's exponent

  BNEXT_INLINE explicit PowerOfTwo(const V& z, float unit, [[maybe_unused]] float low) {
    // Adding 1.5*2^23 rounds to a whole number and leaves it in the low bits.
    constexpr float kRound = 12582912.0f;
    const V shifted = z * unit + kRound;
    f = z * unit - (shifted - kRound);
    if constexpr (kDigits == Digits::kFloat32) {
      f = z * low + f;
      quotient = f * 1.53533096e-4f + 1.3398939e-3f;  // relative error of 2^f: 2e-9
      quotient = quotient * f + 9.61843785e-3f;
      quotient = quotient * f + 5.55033237e-2f;
      quotient = quotient * f + 0.240226477f;
      quotient = quotient * f + 0.693147182f;
    } else {
      quotient = f * 9.58281476e-3f + 5.59068173e-2f;  // 3e-6
      quotient = quotient * f + 0.240241021f;
      quotient = quotient * f + 0.693124175f;
    }
    n = __builtin_bit_cast(Bits, shifted) << 23;
  }
};

// 2^x. Not for a NaN, whose bits do not survive the scaling.
template <Digits kDigits, typename V>
BNEXT_INLINE V power_of_two(const V& z, float unit = 1.0f, float low = 0.0f) {
  using Bits = typename LanesOf<V>::Bits;
  const PowerOfTwo<kDigits, V> x(z, unit, low);
  const V power = x.quotient * x.f + 1.0f;
  return __builtin_bit_cast(V, __builtin_bit_cast(Bits, power) + x.n);
}

// log2(e), and what the float lacks of it.
constexpr float kLog2E = 1.44269502f;
constexpr float kLog2ELow = 1.92596303e-8f;

// For |z| up to this, e^z is a normal float32.
constexpr float kExpMost = 87.0f;

// e^z for z up to `most`, and e^most beyond. Not for a NaN.
template <Digits kDigits, typename V>
BNEXT_INLINE V exponential(const V& z, scalar_of<V> most) {
  if constexpr (std::is_same_v<scalar_of<V>, double>) {
    return lane_by_lane(z, [most](double lane) { return std::exp(lane > most ? most : lane); });
  } else {
    const V e = power_of_two<kDigits>(clamp<V>(z, -kExpMost, most), kLog2E, kLog2ELow);
    return z < -kExpMost ? V{} : e;
  }
}

// e^z - 1 for z up to 0, and 0 beyond: with relative accuracy near 0, where e^z - 1 cancels. Not for a NaN.
template <typename V>
BNEXT_INLINE V exponential_minus_one(const V& z) {
  if constexpr (std::is_same_v<scalar_of<V>, double>) {
    return lane_by_lane(z, [](double lane) { return std::expm1(lane > 0.0 ? 0.0 : lane); });
  } else {
    using Bits = typename LanesOf<V>::Bits;
    // 2^n*(1 + p) - 1 as 2^n*p + (2^n - 1). The shorter polynomials are too far from (2^f - 1)/f for small f.
    const PowerOfTwo<Digits::kFloat32, V> x(clamp<V>(z, -kExpMost, 0), kLog2E, kLog2ELow);
    const V scale = __builtin_bit_cast(V, __builtin_bit_cast(Bits, V{} + 1.0f) + x.n);
    return x.quotient * x.f * scale + (scale - 1.0f);
  }
}

// The logistic function at z and at -z; neither is computed as 1 minus the other, which would cancel.
template <Digits kDigits, typename V>
struct Logistic {
  V at;
  V opposite;

  BNEXT_INLINE explicit Logistic(const V& z) {
    using T = scalar_of<V>;
    constexpr T kOne = 1;
    if constexpr (std::is_same_v<T, double>) {
      const V e = lane_by_lane(z, [](double lane) { return std::exp(-lane); });
      at = kOne / (e + kOne);
      opposite = lane_by_lane(z, [](double lane) { return 1.0 / (1.0 + std::exp(lane)); });
    } else {
      const V e = power_of_two<kDigits>(clamp<V>(z, -kExpMost, kExpMost), -kLog2E, -kLog2ELow);
      at = z < -kExpMost ? V{} : kOne / (e + kOne);
      opposite = z > kExpMost ? V{} : e * at;
    }
  }
};

// The normal distribution at the distance |z| from its mean, capped where the tail is negligible: the density there and
// the probability of the tail beyond, with relative accuracy also far out, where 1 + erf(z/sqrt(2)) cancels.
template <Digits kDigits, typename V>
struct Normal {
  V distance;
  V density;
  V beyond;

  BNEXT_INLINE explicit Normal(const V& z) {
    using T = scalar_of<V>;
    if constexpr (std::is_same_v<T, double>) {
      distance = lane_by_lane(z, [](double lane) { return std::fabs(lane) > 40.0 ? 40.0 : std::fabs(lane); });
      density = lane_by_lane(distance, [](double lane) { return std::exp(lane * lane * -0.5) * 0.39894228040143268; });
      beyond = lane_by_lane(distance, [](double lane) { return 0.5 * std::erfc(lane * 0.70710678118654752); });
    } else {
      using Bits = typename LanesOf<V>::Bits;
      constexpr float kMost = 12.9f;
      // Non-negative floats compare as their bits do, and integers take fewer instructions.
      const Bits most = Bits{} + __builtin_bit_cast(std::int32_t, kMost);
      const Bits magnitude = __builtin_bit_cast(Bits, z) & 0x7fffffff;
      distance = __builtin_bit_cast(V, magnitude > most ? most : magnitude);
      const V square = distance * distance;
      if constexpr (kDigits != Digits::kBFloat16) {
        const V e = power_of_two<kDigits>(square, -0.721347511f, -9.62981517e-9f);
        density = e * 0.398942280f;
        // e^(-z^2/2)*v*P(v) with v = 1/(1 + 0.26*|z|), relative error 2.5e-8
        const V v = 1.0f / (distance * 0.26f + 1.0f);
        V p = v * 3.05049418e-2f - 1.52829101e-1f;
        p = p * v + 2.51491857e-1f;
        p = p * v - 1.50949605e-1f;
        p = p * v + 1.60948290e-1f;
        p = p * v + 5.10275021e-2f;
        p = p * v + 1.03030298e-1f;
        p = p * v + 1.03016745e-1f;
        p = p * v + 1.03759060e-1f;
        beyond = e * v * p;
      } else {
        density = power_of_two<kDigits>(square * -0.721347520f - 1.32574806f);
        // The tail's logarithm to base 2, within 1e-5 for |z| up to 6 and 2e-4 beyond.
        V p = distance * -2.18287033e-9f + 1.56828378e-7f;
        p = p * distance - 4.93226571e-6f;
        p = p * distance + 9.00368323e-5f;
        p = p * distance - 1.07107498e-3f;
        p = p * distance + 8.89515039e-3f;
        p = p * distance - 5.45358770e-2f;
        p = p * distance - 4.58050430e-1f;
        p = p * distance - 1.15136170f;
        p = p * distance - 9.99990642e-1f;
        beyond = power_of_two<kDigits>(p);
      }
    }
  }
};

// mish(z) = z*tanh(log(1 + e^z)) = z*n/(n + 2) with n = e^z*(e^z + 2), which does not cancel; e^z is capped where the
// fraction is 1, so that n does not overflow.
template <Digits kDigits, typename V>
struct Mish {
  static constexpr int kMost = 40;

  V e;
  V n;

  BNEXT_INLINE explicit Mish(const V& z) {
    constexpr scalar_of<V> kTwo = 2;
    e = exponential<kDigits>(z, kMost);
    n = e * (e + kTwo);
  }
};

// `open` where z is above zero or a NaN, else `closed`.
template <typename V>
BNEXT_INLINE V rectified(const V& z, const V& open, const V& closed) {
  return z <= static_cast<scalar_of<V>>(0) ? closed : open;
}

// A value that is above zero or a NaN exactly where the rectifier is open at z, which a mask's bit records. The bit, 0
// or 1, is such a value itself.
template <typename V>
BNEXT_INLINE V opening(const Activation& a, const V& z) {
  return a.act == Act::kRelu6 ? (z >= static_cast<scalar_of<V>>(6) ? V{} : z) : z;
}

// act(z)
template <Digits kDigits, typename V>
BNEXT_INLINE V activate(const Activation& a, const V& z) {
  using T = scalar_of<V>;
  switch (a.act) {
    case Act::kIdentity: return z;
    case Act::kRelu: return rectified(z, z, V{});
    case Act::kRelu6: return clamp<V>(z, 0, 6);
    case Act::kLeakyRelu: return rectified(z, z, z * static_cast<T>(a.slope));
    case Act::kSilu: return z * Logistic<kDigits, V>(z).at;
    case Act::kGelu: {
      const Normal<kDigits, V> normal(z);
      return (z <= static_cast<T>(0) ? z - z : z) - normal.distance * normal.beyond;
    }
    case Act::kHardswish: return z * (clamp<V>(z + static_cast<T>(3), 0, 6) * static_cast<T>(1.0 / 6.0));
    case Act::kMish: {
      const Mish<kDigits, V> mish(z);
      return z * (mish.n / (mish.n + static_cast<T>(2)));
    }
    case Act::kElu: return rectified(z, z, exponential_minus_one(z) * static_cast<T>(a.slope));
  }
  __builtin_unreachable();
}

// dy * act'(z)
template <Digits kDigits, typename V>
BNEXT_INLINE V activation_grad(const Activation& a, const V& z, const V& dy) {
  using T = scalar_of<V>;
  constexpr T kOne = 1;
  switch (a.act) {
    case Act::kIdentity: return dy;
    case Act::kRelu: return rectified(z, dy, V{});
    case Act::kRelu6: return rectified(opening(a, z), dy, V{});
    case Act::kLeakyRelu: return rectified(z, dy, dy * static_cast<T>(a.slope));
    case Act::kSilu: {
      const Logistic<kDigits, V> logistic(z);
      return dy * (logistic.at * (z * logistic.opposite + kOne));
    }
    case Act::kGelu: {
      const Normal<kDigits, V> normal(z);
      const V left = normal.beyond - normal.distance * normal.density;
      return (dy + (z - z)) * (z > static_cast<T>(0) ? kOne - left : left);
    }
    case Act::kHardswish: {
      const V inside = dy * (z * static_cast<T>(1.0 / 3.0) + static_cast<T>(0.5));
      return z <= static_cast<T>(-3) ? V{} : z >= static_cast<T>(3) ? dy : inside;
    }
    case Act::kMish: {
      // n/(n + 2) + z*4*e*(e + 1)/(n + 2)^2, whose second term is 0 where z is clamped.
      const Mish<kDigits, V> mish(z);
      const V inverse = kOne / (mish.n + static_cast<T>(2));
      const V bend = clamp<V>(z, -1000, mish.kMost) * (mish.e * (mish.e + kOne) * static_cast<T>(4));
      return dy * (inverse * (bend * inverse + mish.n));
    }
    case Act::kElu: return rectified(z, dy, dy * (exponential<kDigits>(z, 0) * static_cast<T>(a.slope)));
  }
  __builtin_unreachable();
}

}  // namespace bnext
