// A call, seen from one channel: which value to shift its elements by, whether its sums are good enough, and how they
// become statistics, results and the map's coefficients. One copy for every device and layout.
#pragma once

#include <cmath>
#include <cstdint>

#include "arguments.h"
#include "statistics.h"

namespace bnext {

// A channel's two sums, and the value its elements were shifted by.
struct ChannelSums {
  double shift = 0.0;
  double first = 0.0;
  double second = 0.0;
};

// Where several blocks finish the same channel, only one of them `stores` what the caller asked for.

struct TrainingForwardOp {
  TrainingForward args;
  DType dtype;
  double count;

  BNEXT_INLINE bool accurate(const ChannelSums& sums) const {
    return sums_are_accurate(sums.first, sums.second, count, args.eps);
  }

  BNEXT_INLINE double better_shift(const ChannelSums& sums) const {
    const double mean = sums.shift + sums.first / count;
    return std::isfinite(mean) ? mean : sums.shift;
  }

  // The shift is a sample.
  BNEXT_INLINE void reduce_coefficients(std::int64_t, double (&)[kMaxReduceCoefficients]) const {}

  BNEXT_INLINE void finish(std::int64_t c, const ChannelSums& sums, bool stores,
                           double (&coefficients)[kMaxCoefficients]) const {
    const Moments moments = moments_from_sums(sums.shift, sums.first, sums.second, count);
    const double invstd = invstd_from_var(moments.var, args.eps);
    if (stores) {
      args.save_mean[c] = moments.mean;
      args.save_invstd[c] = invstd;
      update(args.running_mean, c, moments.mean);
      update(args.running_var, c, unbiased_var(moments.var, count));
    }
    normalize_coefficients(dtype, moments.mean, invstd, load_or(args.weight, c, 1.0), load_or(args.bias, c, 0.0),
                           coefficients);
  }

 private:
  BNEXT_INLINE void update(const MutableChannelVector& running, std::int64_t c, double batch) const {
    if (running.data == nullptr) return;
    // The counter still stands at the batches before this one.
    const double momentum = args.cumulative ? 1.0 / static_cast<double>(*args.num_batches_tracked + 1) : args.momentum;
    store(running, c, updated_running_stat(load({running.data, running.dtype}, c), batch, momentum));
  }
};

struct EvalForwardOp {
  EvalForward args;
  DType dtype;

  BNEXT_INLINE bool accurate(const ChannelSums&) const { return true; }
  BNEXT_INLINE double better_shift(const ChannelSums& sums) const { return sums.shift; }
  BNEXT_INLINE void reduce_coefficients(std::int64_t, double (&)[kMaxReduceCoefficients]) const {}

  BNEXT_INLINE void finish(std::int64_t c, const ChannelSums&, bool stores,
                           double (&coefficients)[kMaxCoefficients]) const {
    const double mean = load(args.running_mean, c);
    const double invstd = invstd_from_var(load(args.running_var, c), args.eps);
    if (stores) {
      args.save_mean[c] = mean;
      args.save_invstd[c] = invstd;
    }
    normalize_coefficients(dtype, mean, invstd, load_or(args.weight, c, 1.0), load_or(args.bias, c, 0.0), coefficients);
  }
};

struct BackwardOp {
  Backward args;
  DType dtype;
  double count;

  BNEXT_INLINE bool accurate(const ChannelSums& sums) const {
    return std::isfinite(sums.first) && std::isfinite(sums.second);
  }
  BNEXT_INLINE double better_shift(const ChannelSums& sums) const { return sums.shift; }

  // The shift; with an activation also what the pre-activation is computed with.
  BNEXT_INLINE void reduce_coefficients(std::int64_t c, double (&coefficients)[kMaxReduceCoefficients]) const {
    if (args.activated()) {
      double normalize[kMaxCoefficients];
      normalization(c, normalize);
      for (int k = 0; k < kMaxReduceCoefficients; ++k) coefficients[k] = normalize[k];
    } else {
      coefficients[0] = SplitMean(dtype, args.save_mean[c]).high;
    }
  }

  BNEXT_INLINE void finish(std::int64_t c, const ChannelSums& sums, bool stores,
                           double (&coefficients)[kMaxCoefficients]) const {
    const double mean = args.save_mean[c];
    const double invstd = args.save_invstd[c];
    const double weight = load_or(args.weight, c, 1.0);
    const ParameterGrads grads = grads_from_sums(sums.shift, mean, sums.first, sums.second);
    if (stores && args.grad_weight.data != nullptr) store(args.grad_weight, c, grads.sum_dy_xmu * invstd);
    if (stores && args.grad_bias.data != nullptr) store(args.grad_bias, c, grads.sum_dy);
    if (args.activated()) {
      normalization(c, coefficients);
      coefficients[4] = coefficients[2];
    }
    if (args.differentiates_statistics()) {
      grad_input_coefficients(dtype, mean, invstd, weight, grads, count, coefficients);
    } else if (!args.activated()) {
      coefficients[0] = weight * invstd;
    }
  }

 private:
  // Those of the forward pass.
  BNEXT_INLINE void normalization(std::int64_t c, double (&coefficients)[kMaxCoefficients]) const {
    normalize_coefficients(dtype, args.save_mean[c], args.save_invstd[c], load_or(args.weight, c, 1.0),
                           load_or(args.bias, c, 0.0), coefficients);
  }
};

}  // namespace bnext
