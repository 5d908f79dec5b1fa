// The per-channel mathematics: from sums to statistics, to coefficients, to parameter gradients. One copy for
// every device, layout and dtype; derivations are in docs/numerics.md. V is a double, or a SIMD vector of doubles for
// as many channels.
#pragma once

#include <cmath>
#include <type_traits>

#include "activation.h"
#include "elementwise.h"
#include "problem.h"

namespace bnext {

// A bool, or a mask of lanes; & and | serve both.
template <typename V>
BNEXT_INLINE auto is_finite(const V& x) {
  return x - x == V{};
}

// Each lane rounded to float32. (If these conversions are written lane by lane, GCC 12 vectorises the rounding away.)
template <typename V>
BNEXT_INLINE V rounded_to_float32(const V& x) {
#if !defined(__CUDACC__)
  if constexpr (!std::is_same_v<V, double>) {
    typedef float Single __attribute__((vector_size(sizeof(V) / 2)));
    return __builtin_convertvector(__builtin_convertvector(x, Single), V);
  } else
#endif
    return static_cast<double>(static_cast<float>(x));
}

// The shift without bits finer than those of `size`, if it is smaller than `size`, which is a few times the spread of
// the values to be shifted; `sum` is shift + size in their type. Subtracting a number with finer bits would round all
// values that share an exponent by the same amount, and their sum would be off by that amount times their count.
template <typename V>
BNEXT_INLINE V coarse_shift(const V& shift, const V& size, const V& sum) {
  using T = scalar_of<V>;
  const V magnitude = shift < static_cast<T>(0) ? -shift : shift;
  const V coarse = sum - size;
  return (magnitude < size) & (size < static_cast<T>(1e37)) ? coarse : shift;
}

// A channel's two sums, and the value its elements were shifted by.
template <typename V>
struct SumsOf {
  V shift = {};
  V first = {};
  V second = {};
};
using ChannelSums = SumsOf<double>;

template <typename V>
struct Moments {
  V mean;
  V var;  // biased: divided by count
};

// Statistics of `count` values from first = sum(x - shift) and second = sum((x - shift)^2).
template <typename V>
BNEXT_INLINE Moments<V> moments_from_sums(const SumsOf<V>& sums, double count) {
  const V delta = sums.first / count;
  const V m2 = sums.second - sums.first * delta;
  // Rounding may leave m2 slightly below zero; the comparison keeps a NaN.
  return {sums.shift + delta, m2 < 0.0 ? V{} : m2 / count};
}

// Whether float32 sums gave the variance to float32's accuracy. False
// * if they overflowed (or the data holds an inf or NaN, for which recomputing in float64 does no harm);
// * if the shift lies more than two standard deviations from the mean, so that the difference of squares cancels;
// * if squares may have underflowed where eps is too small to hide it.
template <typename V>
BNEXT_INLINE auto sums_are_accurate(const SumsOf<V>& sums, double count, double eps) {
  const V delta = sums.first / count;
  const V var = sums.second / count - delta * delta;
  const double least = eps > 1e-24 ? -INFINITY : 1e-30;
  return is_finite(sums.first) & is_finite(sums.second) & (delta * delta <= 4.0 * var) & (var > least);
}

template <typename V>
BNEXT_INLINE V invstd_from_var(const V& var, double eps) {
  return 1.0 / lane_by_lane(var + eps, [](double lane) { return std::sqrt(lane); });
}

// The statistics of a local batch, or of several together.
struct LocalStats {
  double count = 0.0;
  double mean = 0.0;
  double m2 = 0.0;  // sum of (x - mean)^2

  // By Chan's formula. Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
  // Sample Variances", 1979.
  BNEXT_INLINE void merge(const LocalStats& other) {
    if (other.count == 0.0) return;
    const double total = count + other.count;
    const double delta = other.mean - mean;
    const double share = other.count / total;
    // delta is not finite where a mean is infinite.
    mean = is_finite(delta) ? mean + delta * share : mean * (1.0 - share) + other.mean * share;
    m2 += other.m2 + delta * delta * (count * other.count / total);
    count = total;
  }
};

// (1 - momentum)*running + momentum*batch; the variance goes in unbiased.
template <typename V>
BNEXT_INLINE V updated_running_stat(const V& running, const V& batch, double momentum) {
  return (1.0 - momentum) * running + momentum * batch;
}

template <typename V>
BNEXT_INLINE V unbiased_var(const V& var, double count) {
  return var * (count / (count - 1.0));
}

// The mean as float32 (float64 for float64 data), and the remainder. The elements are shifted by the first, which
// float32 subtracts exactly from values near it; the remainder goes into the additive coefficient. So data with a large
// offset keeps its accuracy.
template <typename V>
struct SplitMean {
  V high;
  V low;
  BNEXT_INLINE SplitMean(DType dtype, const V& mean) {
    high = dtype == DType::kFloat64 ? mean : rounded_to_float32(mean);
    low = is_finite(high) ? mean - high : V{};
  }
};

// Coefficients of Normalize: y = weight*(x - mean)*invstd + bias.
template <typename V>
BNEXT_INLINE void normalize_coefficients(DType dtype, const V& mean, const V& invstd, const V& weight, const V& bias,
                                         V (&c)[kMaxCoefficients]) {
  const SplitMean<V> split(dtype, mean);
  const V scale = weight * invstd;
  c[0] = split.high;
  c[1] = scale;
  c[2] = bias - split.low * scale;
}

// The sums of GradSums, with the shift replaced by the exact mean.
template <typename V>
struct ParameterGrads {
  V sum_dy;      // = grad_bias
  V sum_dy_xmu;  // sum of dy*(x - mean); times invstd = grad_weight
};

template <typename V>
BNEXT_INLINE ParameterGrads<V> grads_from_sums(const SumsOf<V>& sums, const V& mean) {
  return {sums.first, sums.second - (mean - sums.shift) * sums.first};
}

// Coefficients of GradInput: dx = weight*invstd*(dy - mean of dy - xhat*(mean of dy*xhat)).
template <typename V>
BNEXT_INLINE void grad_input_coefficients(DType dtype, const V& mean, const V& invstd, const V& weight,
                                          const V& mean_dy_xhat, const V& mean_dy, V (&c)[kMaxCoefficients]) {
  const SplitMean<V> split(dtype, mean);
  const V scale = weight * invstd;
  const V slope = -scale * mean_dy_xhat * invstd;
  c[0] = split.high;
  c[1] = scale;
  c[2] = slope;
  c[3] = -scale * mean_dy - split.low * slope;
}

// Whether a coefficient survives the conversion to float32: neither overflow nor underflow. Data of magnitude 1e30 has
// an invstd of 1e-30, whose square float32 does not hold. An inf or NaN is the same in both.
template <typename V>
BNEXT_INLINE auto fits_float32(const V& coefficient) {
  const V magnitude = coefficient < 0.0 ? -coefficient : coefficient;
  return (magnitude == 0.0) | !is_finite(coefficient) | ((magnitude > 1e-36) & (magnitude < 1e37));
}

BNEXT_INLINE bool fits_float32(const double* coefficients, int n) {
  bool fits = true;
  for (int i = 0; i < n; ++i) fits &= fits_float32(coefficients[i]);
  return fits;
}

}  // namespace bnext
