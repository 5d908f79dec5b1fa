// What a call computes per channel: which value to shift the elements by, whether the sums are accurate enough, and how
// the sums become statistics, results and the map's coefficients. One copy for every device and layout.
//
// An Access reads and writes the values of one channel, or of several next to each other, as its V.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "statistics.h"

namespace bnext {

struct OneChannel {
  using V = double;
  BNEXT_INLINE V load(const ChannelVector& from, std::int64_t c) const { return bnext::load(from, c); }
  BNEXT_INLINE V load(const double* from, std::int64_t c) const { return from[c]; }
  BNEXT_INLINE void store(const MutableChannelVector& to, std::int64_t c, V value) const { bnext::store(to, c, value); }
  BNEXT_INLINE void store(double* to, std::int64_t c, V value) const { to[c] = value; }
};

template <typename Access>
BNEXT_INLINE typename Access::V load_or(const Access& access, const ChannelVector& from, std::int64_t c,
                                        double absent) {
  return from.data == nullptr ? typename Access::V{} + absent : access.load(from, c);
}

template <typename Vector, typename Visit>
BNEXT_INLINE void visit_value(const Vector& of, std::int64_t c, Visit&& visit) {
  if (of.data != nullptr) visit(static_cast<const char*>(of.data) + c * element_size(of.dtype));
}

// The weight in the running statistics of a batch, or of the part number `part` of a batch. The counter does not
// include this batch yet.
BNEXT_INLINE double momentum_of(const Running& running, std::int64_t part = 0) {
  return running.cumulative ? 1.0 / static_cast<double>(*running.num_batches_tracked + 1 + part) : running.momentum;
}

// Updates the running statistics with a batch's mean and unbiased variance. One value has no unbiased variance.
template <typename V, typename Access>
BNEXT_INLINE void update_running(const Running& running, std::int64_t c, const Moments<V>& batch, double count,
                                 Access access) {
  const auto update = [&](const MutableChannelVector& to, const V& value) {
    if (to.data == nullptr) return;
    const double momentum = momentum_of(running);
    const V before = access.load(ChannelVector{to.data, to.dtype}, c);
    access.store(to, c, updated_running_stat(before, value, momentum));
  };
  update(running.mean, batch.mean);
  if (count > 1.0) update(running.var, unbiased_var(batch.var, count));
}

// `finish` gets `stores`: where several blocks finish the same channel, only one of them writes the caller's results.

struct TrainingForwardOp {
  TrainingForward args;
  DType dtype;
  double count;

  template <typename V>
  BNEXT_INLINE auto accurate(const SumsOf<V>& sums) const {
    return sums_are_accurate(sums, count, args.eps);
  }

  BNEXT_INLINE double refined_shift(const ChannelSums& sums) const {
    const double mean = sums.shift + sums.first / count;
    return is_finite(mean) ? mean : sums.shift;
  }

  // Calls visit(address) for the channel's value of each vector that `finish` is the first to load.
  template <typename Visit>
  BNEXT_INLINE void for_each_late(std::int64_t c, Visit&& visit) const {
    visit_value(args.weight, c, visit);
    visit_value(args.bias, c, visit);
    visit_value(args.running.mean, c, visit);
    visit_value(args.running.var, c, visit);
  }

  // A forward reduction takes its shift from samples of the input (samples.h).
  template <typename V, typename Access = OneChannel>
  BNEXT_INLINE void reduce_coefficients(std::int64_t, V (&)[kMaxReduceCoefficients], Access = {}) const {}

  template <typename V, typename Access = OneChannel>
  BNEXT_INLINE void finish(std::int64_t c, const SumsOf<V>& sums, bool stores, V (&coefficients)[kMaxCoefficients],
                           Access access = {}) const {
    const Moments<V> moments = moments_from_sums(sums, count);
    const V invstd = invstd_from_var(moments.var, args.eps);
    if (stores) {
      access.store(args.save_mean, c, moments.mean);
      if (args.save_m2 != nullptr) access.store(args.save_m2, c, moments.var * count);
      if (args.save_invstd != nullptr) access.store(args.save_invstd, c, invstd);
      update_running(args.running, c, moments, count, access);
    }
    normalize_coefficients(dtype, moments.mean, invstd, load_or(access, args.weight, c, 1.0),
                           load_or(access, args.bias, c, 0.0), coefficients);
  }
};

// The stats are merged in the order of the processes, so that all processes get the same bits.
struct GatherStatsOp {
  GatherStats args;

  BNEXT_INLINE void finish(std::int64_t c) const {
    LocalStats all;
    for (std::int64_t p = 0; p < args.processes; ++p) {
      const double* row = args.local_stats + p * (2 * args.C + 1);
      all.merge({row[2 * args.C], row[c], row[args.C + c]});
    }
    const Moments<double> moments{all.mean, all.count > 0.0 ? all.m2 / all.count : 0.0};
    args.mean[c] = moments.mean;
    args.var[c] = moments.var;
    if (all.count > 0.0) update_running(args.running, c, moments, all.count, OneChannel());
  }
};

// The running statistics after a batch of several parts, as a loop of calls with one part each would update them.
struct UpdateByPartsOp {
  Running running;
  std::int64_t parts;
  std::int64_t C;
  const double* mean;   // as saved: part p's means are 2*C*p further on
  const double* m2;     // (parts, C): sums of (x - mean)^2
  const double* count;  // (parts): values a channel; 0: the part has no statistics

  // Between the parts a statistic is not rounded to its dtype. One value has no unbiased variance.
  BNEXT_INLINE void finish(std::int64_t c) const {
    const OneChannel access;
    double running_mean = load_or(access, {running.mean.data, running.mean.dtype}, c, 0.0);
    double running_var = load_or(access, {running.var.data, running.var.dtype}, c, 0.0);
    BNEXT_NO_UNROLL
    for (std::int64_t p = 0; p < parts; ++p) {
      const double values = count[p];
      if (values < 1.0) continue;
      const double momentum = momentum_of(running, p);
      running_mean = updated_running_stat(running_mean, mean[2 * p * C + c], momentum);
      if (values > 1.0) running_var = updated_running_stat(running_var, m2[p * C + c] / (values - 1.0), momentum);
    }
    if (running.mean.data != nullptr) access.store(running.mean, c, running_mean);
    if (running.var.data != nullptr) access.store(running.var, c, running_var);
  }
};

struct EvalForwardOp {
  EvalForward args;
  DType dtype;

  template <typename V>
  BNEXT_INLINE auto accurate(const SumsOf<V>&) const {
    return V{} == V{};
  }
  BNEXT_INLINE double refined_shift(const ChannelSums& sums) const { return sums.shift; }
  template <typename V, typename Access = OneChannel>
  BNEXT_INLINE void reduce_coefficients(std::int64_t, V (&)[kMaxReduceCoefficients], Access = {}) const {}

  template <typename V, typename Access = OneChannel>
  BNEXT_INLINE void finish(std::int64_t c, const SumsOf<V>&, bool stores, V (&coefficients)[kMaxCoefficients],
                           Access access = {}) const {
    const V mean = access.load(args.running_mean, c);
    const V invstd = args.invstd.data != nullptr ? access.load(args.invstd, c)
                                                 : invstd_from_var(access.load(args.running_var, c), args.eps);
    if (stores) {
      access.store(args.save_mean, c, mean);
      access.store(args.save_invstd, c, invstd);
    }
    normalize_coefficients(dtype, mean, invstd, load_or(access, args.weight, c, 1.0),
                           load_or(access, args.bias, c, 0.0), coefficients);
  }
};

struct BackwardOp {
  Backward args;
  DType dtype;
  double count;

  template <typename V>
  BNEXT_INLINE auto accurate(const SumsOf<V>& sums) const {
    return is_finite(sums.first) & is_finite(sums.second);
  }
  BNEXT_INLINE double refined_shift(const ChannelSums& sums) const { return sums.shift; }

  template <typename Visit>
  BNEXT_INLINE void for_each_late(std::int64_t c, Visit&& visit) const {
    if (!args.activated()) visit_value(args.weight, c, visit);
    visit_value(args.mean_dz, c, visit);
    visit_value(args.mean_dz_xhat, c, visit);
  }

  // The sums' shift; with an activation also the coefficients of the pre-activation.
  template <typename V, typename Access = OneChannel>
  BNEXT_INLINE void reduce_coefficients(std::int64_t c, V (&coefficients)[kMaxReduceCoefficients],
                                        Access access = {}) const {
    const V high = SplitMean<V>(dtype, access.load(args.save_mean, c)).high;
    const V size = rounded_to_float32(8.0 / access.load(args.save_invstd, c));
    const V sum = high + size;
    coefficients[0] = coarse_shift(high, size, dtype == DType::kFloat64 ? sum : rounded_to_float32(sum));
    if (args.activated()) {
      V normalize[kMaxCoefficients];
      normalization(c, normalize, access);
      coefficients[1] = normalize[1];
      coefficients[2] = normalize[2];
      coefficients[3] = normalize[0];
    }
  }

  template <typename V, typename Access = OneChannel>
  BNEXT_INLINE void finish(std::int64_t c, const SumsOf<V>& sums, bool stores, V (&coefficients)[kMaxCoefficients],
                           Access access = {}) const {
    const V mean = access.load(args.save_mean, c);
    const V invstd = access.load(args.save_invstd, c);
    const V weight = load_or(access, args.weight, c, 1.0);
    const ParameterGrads<V> grads = grads_from_sums(sums, mean);
    if (stores && args.grad_weight.data != nullptr) access.store(args.grad_weight, c, grads.sum_dy_xmu * invstd);
    if (stores && args.grad_bias.data != nullptr) access.store(args.grad_bias, c, grads.sum_dy);
    if (args.activated()) {
      normalization(c, coefficients, access);
      coefficients[4] = coefficients[2];
    }
    if (args.differentiates_statistics()) {
      const bool given = args.mean_dz.data != nullptr;
      const V mean_dz_xhat = given ? access.load(args.mean_dz_xhat, c) : grads.sum_dy_xmu * invstd / count;
      const V mean_dz = given ? access.load(args.mean_dz, c) : grads.sum_dy / count;
      grad_input_coefficients(dtype, mean, invstd, weight, mean_dz_xhat, mean_dz, coefficients);
    } else if (!args.activated()) {
      coefficients[0] = weight * invstd;
    }
  }

 private:
  // The forward pass's coefficients.
  template <typename V, typename Access>
  BNEXT_INLINE void normalization(std::int64_t c, V (&coefficients)[kMaxCoefficients], Access access) const {
    normalize_coefficients(dtype, access.load(args.save_mean, c), access.load(args.save_invstd, c),
                           load_or(access, args.weight, c, 1.0), load_or(access, args.bias, c, 0.0), coefficients);
  }
};

// The parameters' gradients of a batch of several parts: the parts' gradients, added in order. Null: not asked for.
struct SumOfPartsOp {
  MutableChannelVector grad_weight;
  MutableChannelVector grad_bias;
  const double* weight_of_parts;  // (parts, C)
  const double* bias_of_parts;
  std::int64_t parts;
  std::int64_t C;

  BNEXT_INLINE void finish(std::int64_t c) const {
    add(grad_weight, weight_of_parts, c);
    add(grad_bias, bias_of_parts, c);
  }

 private:
  BNEXT_INLINE void add(const MutableChannelVector& to, const double* of_parts, std::int64_t c) const {
    if (to.data == nullptr) return;
    double sum = 0.0;
    for (std::int64_t p = 0; p < parts; ++p) sum += of_parts[p * C + c];
    store(to, c, sum);
  }
};

}  // namespace bnext
