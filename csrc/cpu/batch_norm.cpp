#include "batch_norm.h"

#include <cmath>

#include "../common/statistics.h"
#include "traversal.h"

namespace bnext::cpu {
namespace {

void run(const Problem& problem, ChannelOp& op, const Parallel& parallel) {
  if (problem.layout == Layout::kChannelsFirst) {
    run_channels_first(problem, op, parallel);
  } else {
    run_channels_last(problem, op, parallel);
  }
}

class TrainingForwardOp final : public ChannelOp {
 public:
  TrainingForwardOp(const Problem& problem, const TrainingForward& args)
      : args_(args), dtype_(problem.dtype), count_(static_cast<double>(problem.count())) {
    in[0] = args.input;
    out = args.output;
    reduces = true;
    reduce_op = ReduceOp::kMomentSums;
    map_op = MapOp::kNormalize;
  }

  bool accurate(const ChannelSums& sums) const override {
    return sums_are_accurate(sums.first, sums.second, count_, args_.eps);
  }

  double better_shift(const ChannelSums& sums) const override {
    const double mean = sums.shift + sums.first / count_;
    return std::isfinite(mean) ? mean : sums.shift;
  }

  void finish(std::int64_t c, const ChannelSums& sums, double (&coefficients)[kMaxCoefficients]) override {
    const Moments moments = moments_from_sums(sums.shift, sums.first, sums.second, count_);
    const double invstd = invstd_from_var(moments.var, args_.eps);
    args_.save_mean[c] = moments.mean;
    args_.save_invstd[c] = invstd;
    update(args_.running_mean, c, moments.mean);
    update(args_.running_var, c, unbiased_var(moments.var, count_));
    normalize_coefficients(dtype_, moments.mean, invstd, load_or(args_.weight, c, 1.0), load_or(args_.bias, c, 0.0),
                           coefficients);
  }

 private:
  void update(const MutableChannelVector& running, std::int64_t c, double batch) const {
    if (running.data == nullptr) return;
    store(running, c, updated_running_stat(load({running.data, running.dtype}, c), batch, args_.momentum));
  }

  const TrainingForward& args_;
  DType dtype_;
  double count_;
};

class EvalForwardOp final : public ChannelOp {
 public:
  EvalForwardOp(const Problem& problem, const EvalForward& args) : args_(args), dtype_(problem.dtype) {
    in[0] = args.input;
    out = args.output;
    map_op = MapOp::kNormalize;
  }

  bool accurate(const ChannelSums&) const override { return true; }
  double better_shift(const ChannelSums& sums) const override { return sums.shift; }

  void finish(std::int64_t c, const ChannelSums&, double (&coefficients)[kMaxCoefficients]) override {
    const double mean = load(args_.running_mean, c);
    const double invstd = invstd_from_var(load(args_.running_var, c), args_.eps);
    args_.save_mean[c] = mean;
    args_.save_invstd[c] = invstd;
    normalize_coefficients(dtype_, mean, invstd, load_or(args_.weight, c, 1.0), load_or(args_.bias, c, 0.0),
                           coefficients);
  }

 private:
  const EvalForward& args_;
  DType dtype_;
};

class BackwardOp final : public ChannelOp {
 public:
  BackwardOp(const Problem& problem, const Backward& args)
      : args_(args), dtype_(problem.dtype), count_(static_cast<double>(problem.count())) {
    const bool projects = args.training && args.grad_input != nullptr;
    const bool needs_input = projects || args.grad_weight.data != nullptr;
    in[0] = needs_input ? args.input : nullptr;
    in[1] = args.grad_output;
    out = args.grad_input;
    reduces = needs_input || args.grad_bias.data != nullptr;
    reduce_op = needs_input ? ReduceOp::kGradSums : ReduceOp::kBiasGradSum;
    map_op = args.training ? MapOp::kGradInput : MapOp::kScaleGrad;
    shift = args.save_mean;
  }

  bool accurate(const ChannelSums& sums) const override {
    return std::isfinite(sums.first) && std::isfinite(sums.second);
  }
  double better_shift(const ChannelSums& sums) const override { return sums.shift; }

  void finish(std::int64_t c, const ChannelSums& sums, double (&coefficients)[kMaxCoefficients]) override {
    const double mean = args_.save_mean[c];
    const double invstd = args_.save_invstd[c];
    const double weight = load_or(args_.weight, c, 1.0);
    const ParameterGrads grads = grads_from_sums(sums.shift, mean, sums.first, sums.second);
    if (args_.grad_weight.data != nullptr) store(args_.grad_weight, c, grads.sum_dy_xmu * invstd);
    if (args_.grad_bias.data != nullptr) store(args_.grad_bias, c, grads.sum_dy);
    if (args_.training) {
      grad_input_coefficients(dtype_, mean, invstd, weight, grads, count_, coefficients);
    } else {
      coefficients[0] = weight * invstd;
    }
  }

 private:
  const Backward& args_;
  DType dtype_;
  double count_;
};

}  // namespace

void forward(const Problem& problem, const TrainingForward& args, const Parallel& parallel) {
  TrainingForwardOp op(problem, args);
  run(problem, op, parallel);
}

void forward(const Problem& problem, const EvalForward& args, const Parallel& parallel) {
  EvalForwardOp op(problem, args);
  run(problem, op, parallel);
}

void backward(const Problem& problem, const Backward& args, const Parallel& parallel) {
  BackwardOp op(problem, args);
  run(problem, op, parallel);
}

}  // namespace bnext::cpu
