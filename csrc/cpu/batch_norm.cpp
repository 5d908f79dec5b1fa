#include "batch_norm.h"

#include <algorithm>
#include <vector>

#include "../common/channel_ops.h"
#include "../common/mask.h"
#include "isa/dispatch.h"
#include "parts.h"
#include "traversal.h"
#include "valid.h"

namespace bnext::cpu {
namespace {

// Limits on the bytes that a call reads and writes in total. A non-temporal store saves the read of the line that it
// overwrites, a third of the traffic, and leaves the caches to inputs that are read twice. Planes that are read once
// have a higher limit: a third-level cache may hold their outputs (channels last does not gain by this). Short planes
// have the highest: their first and last lines are stored through the caches, which may hold all up to that size.
constexpr std::int64_t kL2Bytes = std::int64_t{4} << 20;
constexpr std::int64_t kNonTemporalBytes = std::int64_t{18} << 20;
constexpr std::int64_t kNonTemporalOnceBytes = std::int64_t{28} << 20;
constexpr std::int64_t kNonTemporalShortBytes = std::int64_t{40} << 20;
constexpr std::int64_t kShortPlaneBytes = 1280;

// `whole`: the problem of the whole call, of which `problem` may be one part.
void run(const Problem& whole, const Problem& problem, ChannelOp& op, const Parallel& parallel) {
  const std::int64_t tensors = element_size(problem.dtype) * (op.inputs() + op.outputs());
  const std::int64_t bytes = whole.numel() * tensors;
  op.exceeds_l2 = problem.numel() * tensors >= kL2Bytes;
  op.valid = problem.valid;
  const bool planes = problem.layout == Layout::kChannelsFirst;
  const bool short_planes = planes && problem.HW * element_size(problem.dtype) < kShortPlaneBytes;
  const bool once = planes && !op.reduces;
  op.non_temporal = bytes >= (short_planes ? kNonTemporalShortBytes : once ? kNonTemporalOnceBytes : kNonTemporalBytes);
  if (problem.layout == Layout::kChannelsFirst) {
    run_channels_first(problem, op, parallel);
  } else {
    run_channels_last(problem, op, parallel);
  }
}

// Sets what training and evaluation have in common.
template <typename Args>
void set_forward(ChannelOp& op, const Args& args) {
  op.in[0] = args.input;
  op.in[2] = args.epilogue.residual;
  op.out[0] = args.output;
  op.mask = args.epilogue.mask;
  op.epilogue.activation = args.epilogue.activation;
  op.epilogue.has_residual = args.epilogue.residual != nullptr;
  op.map_op = args.epilogue.present() ? MapOp::kActivatedNormalize : MapOp::kNormalize;
}

void count_batches(const Running& running, std::int64_t batches) {
  if (running.num_batches_tracked != nullptr) *running.num_batches_tracked += batches;
}

std::int64_t count_of(const Problem& problem) {
  return problem.valid == nullptr ? problem.count() : count_valid(problem.valid, problem.count());
}

template <typename T>
void clear(T* to, std::int64_t n) {
  if (to != nullptr) std::fill_n(to, n, T{});
}

void clear(void* to, const Problem& problem) {
  clear(static_cast<char*>(to), problem.numel() * element_size(problem.dtype));
}

void clear(const MutableChannelVector& to, std::int64_t C) {
  clear(static_cast<char*>(to.data), C * element_size(to.dtype));
}

void clear_mask(std::uint8_t* mask, const Problem& problem) {
  const std::int64_t rows = problem.layout == Layout::kChannelsFirst ? problem.N * problem.C : problem.count();
  clear(mask, rows * mask_row_bytes(mask_row_elements(problem), kCpuMaskLanes));
}

// Normalises one part of a training batch. Returns the count of values a channel holds, without padding.
std::int64_t train(const Problem& whole, const Problem& problem, const TrainingForward& args,
                   const Parallel& parallel) {
  const std::int64_t count = count_of(problem);
  if (args.save_count != nullptr) *args.save_count = static_cast<double>(count);
  if (count == 0) {  // nothing but padding
    clear(args.output, problem);
    clear_mask(args.epilogue.mask, problem);
    for (double* stats : {args.save_mean, args.save_invstd, args.save_m2}) clear(stats, problem.C);
    return count;
  }
  const SamplePositions samples =
      problem.valid == nullptr ? SamplePositions(count) : samples_of_valid(problem.valid, problem.count(), count);
  const TrainingForwardOp math{args, problem.dtype, static_cast<double>(count)};
  ChannelOp op{&math, current_kernels().training};
  set_forward(op, args);
  op.reduces = true;
  op.samples = &samples;
  op.reduce_op = ReduceOp::kMomentSums;
  run(whole, problem, op, parallel);
  return count;
}

void differentiate(const Problem& whole, const Problem& problem, const Backward& args, const Parallel& parallel) {
  const bool divides = args.differentiates_statistics() && args.mean_dz.data == nullptr;
  const std::int64_t count = divides ? count_of(problem) : problem.count();
  if (count == 0) {
    clear(args.grad_input, problem);
    clear(args.grad_residual, problem);
    clear(args.grad_weight, problem.C);
    clear(args.grad_bias, problem.C);
    return;
  }
  const BackwardOp math{args, problem.dtype, static_cast<double>(count)};
  ChannelOp op{&math, current_kernels().backward};
  op.in[0] = args.reads_input() ? args.input : nullptr;
  op.in[1] = args.grad_output;
  op.in[2] = args.reads_preactivation() ? args.residual : nullptr;
  op.out[0] = args.grad_input;
  op.out[1] = args.grad_residual;
  op.mask = const_cast<std::uint8_t*>(args.mask);  // only read in backward
  op.epilogue = {args.activation, op.in[2] != nullptr, args.mask != nullptr, args.differentiates_statistics()};
  op.reduces = args.reduces();
  if (args.activated()) {
    op.reduce_op = ReduceOp::kActivatedGradSums;
    op.map_op = MapOp::kActivatedGrad;
  } else {
    op.reduce_op = args.reads_input() ? ReduceOp::kGradSums : ReduceOp::kBiasGradSum;
    op.map_op = args.differentiates_statistics() ? MapOp::kGradInput : MapOp::kScaleGrad;
  }
  run(whole, problem, op, parallel);
}

// Finishes all channels, without a pass over the tensors.
template <typename Op>
void finish_channels(const Op& op, std::int64_t C, const Parallel& parallel) {
  parallel(C, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t c = begin; c < end; ++c) op.finish(c);
  });
}

// A per-channel result of each part in float64, (parts, C); empty if nobody asked for the total.
class OfParts {
 public:
  OfParts(const Problem& problem, bool wanted) : C_(problem.C) {
    if (wanted) values_.resize(static_cast<std::size_t>(problem.parts() * C_));
  }

  const double* data() const { return values_.data(); }
  double* of(std::int64_t part) { return values_.empty() ? nullptr : values_.data() + part * C_; }

 private:
  const std::int64_t C_;
  std::vector<double> values_;
};

}  // namespace

void forward(const Problem& problem, const TrainingForward& args, const Parallel& parallel) {
  const std::int64_t parts = problem.parts();
  if (parts == 1) {
    train(problem, problem, args, parallel);
  } else {
    OfParts m2(problem, /*wanted=*/true);
    std::vector<double> counts(static_cast<std::size_t>(parts));
    for_each_part(problem, parallel, [&](const Part& part, const Parallel& within) {
      TrainingForward of_part = part.of(args);
      of_part.running = {};
      of_part.save_m2 = m2.of(part.index);
      counts[part.index] = static_cast<double>(train(problem, part.problem, of_part, within));
    });
    finish_channels(UpdateByPartsOp{args.running, parts, problem.C, args.save_mean, m2.data(), counts.data()},
                    problem.C, parallel);
  }
  count_batches(args.running, parts);
}

void gather_stats(const GatherStats& args) {
  finish_channels(GatherStatsOp{args}, args.C, Parallel::serial());
  count_batches(args.running, 1);
}

void forward(const Problem& problem, const EvalForward& args, const Parallel& parallel) {
  for_each_part(problem, parallel, [&](const Part& part, const Parallel& within) {
    const EvalForwardOp math{part.of(args), problem.dtype};
    ChannelOp op{&math, current_kernels().evaluation};
    set_forward(op, math.args);
    run(problem, part.problem, op, within);
  });
}

void backward(const Problem& problem, const Backward& args, const Parallel& parallel) {
  if (problem.parts() == 1) return differentiate(problem, problem, args, parallel);
  OfParts grad_weight(problem, args.grad_weight.data != nullptr);
  OfParts grad_bias(problem, args.grad_bias.data != nullptr);
  for_each_part(problem, parallel, [&](const Part& part, const Parallel& within) {
    Backward of_part = part.of(args);
    of_part.grad_weight = {grad_weight.of(part.index), DType::kFloat64};
    of_part.grad_bias = {grad_bias.of(part.index), DType::kFloat64};
    differentiate(problem, part.problem, of_part, within);
  });
  finish_channels(
      SumOfPartsOp{args.grad_weight, args.grad_bias, grad_weight.data(), grad_bias.data(), problem.parts(), problem.C},
      problem.C, parallel);
}

}  // namespace bnext::cpu
