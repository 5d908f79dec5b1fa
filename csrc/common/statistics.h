// The per-channel mathematics: from sums to statistics, to coefficients, to parameter gradients. One copy for
// every device, layout and dtype; derivations are in docs/design.md.
#pragma once

#include <cmath>

#include "elementwise.h"
#include "problem.h"

namespace bnext {

struct Moments {
  double mean;
  double var;  // biased: divided by count
};

// Statistics of `count` values from s1 = sum(x - shift) and s2 = sum((x - shift)^2).
BNEXT_INLINE Moments moments_from_sums(double shift, double s1, double s2, double count) {
  const double delta = s1 / count;
  const double m2 = s2 - s1 * delta;
  // Rounding may leave m2 slightly below zero; the comparison keeps a NaN.
  return {shift + delta, m2 < 0.0 ? 0.0 : m2 / count};
}

// Whether float32 sums gave the variance to float32's accuracy. False
// * if they overflowed (or the data holds an inf or NaN, which a second look does not mind);
// * if the shift lies more than two standard deviations from the mean, so that s2 - s1^2/count cancels;
// * if squares may have underflowed where eps is too small to hide it.
BNEXT_INLINE bool sums_are_accurate(double s1, double s2, double count, double eps) {
  const double delta = s1 / count;
  const double var = s2 / count - delta * delta;
  const bool finite = std::isfinite(s1) && std::isfinite(s2);
  const bool near = delta * delta <= 4.0 * var;
  const bool visible = var > 1e-30 || eps > 1e-24;
  return finite && near && visible;
}

BNEXT_INLINE double invstd_from_var(double var, double eps) { return 1.0 / std::sqrt(var + eps); }

// (1 - momentum)*running + momentum*batch; the variance goes in unbiased.
BNEXT_INLINE double updated_running_stat(double running, double batch, double momentum) {
  return (1.0 - momentum) * running + momentum * batch;
}

BNEXT_INLINE double unbiased_var(double var, double count) { return var * (count / (count - 1.0)); }

// The mean as float32 (float64 for float64 data) and what that leaves over. The elements are shifted by the first part,
// which float32 subtracts exactly from values near it; the second goes into the additive coefficient. Data with a large
// offset keeps its accuracy that way.
struct SplitMean {
  double high;
  double low;
  BNEXT_INLINE SplitMean(DType dtype, double mean)
      : high(dtype == DType::kFloat64 ? mean : static_cast<double>(static_cast<float>(mean))),
        low(std::isfinite(high) ? mean - high : 0.0) {}
};

// Coefficients of Normalize: y = weight*(x - mean)*invstd + bias.
BNEXT_INLINE void normalize_coefficients(DType dtype, double mean, double invstd, double weight, double bias,
                                         double (&c)[kMaxCoefficients]) {
  const SplitMean split(dtype, mean);
  const double scale = weight * invstd;
  c[0] = split.high;
  c[1] = scale;
  c[2] = bias - split.low * scale;
}

// The sums of GradSums, with the shift replaced by the exact mean.
struct ParameterGrads {
  double sum_dy;      // = grad_bias
  double sum_dy_xmu;  // sum of dy*(x - mean); times invstd = grad_weight
};

BNEXT_INLINE ParameterGrads grads_from_sums(double shift, double mean, double sum_dy, double sum_dy_shifted) {
  return {sum_dy, sum_dy_shifted - (mean - shift) * sum_dy};
}

// Coefficients of GradInput: dx = weight*invstd*(dy - sum_dy/count - xhat*(sum of dy*xhat)/count).
BNEXT_INLINE void grad_input_coefficients(DType dtype, double mean, double invstd, double weight,
                                          const ParameterGrads& grads, double count, double (&c)[kMaxCoefficients]) {
  const SplitMean split(dtype, mean);
  const double scale = weight * invstd;
  const double slope = -scale * (invstd * grads.sum_dy_xmu) * invstd / count;
  c[0] = split.high;
  c[1] = scale;
  c[2] = slope;
  c[3] = -scale * grads.sum_dy / count - split.low * slope;
}

// Whether every coefficient survives the conversion to float32: neither overflow nor underflow. Data of
// magnitude 1e30 has an invstd of 1e-30, whose square float32 does not hold. An inf or NaN is the same in both.
BNEXT_INLINE bool fits_float32(const double* coefficients, int n) {
  for (int i = 0; i < n; ++i) {
    const double magnitude = std::fabs(coefficients[i]);
    if (magnitude != 0.0 && std::isfinite(magnitude) && !(magnitude > 1e-36 && magnitude < 1e37)) return false;
  }
  return true;
}

}  // namespace bnext
