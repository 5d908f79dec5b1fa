// From the sums of each part to its statistics, its map's coefficients and what the caller asked for: by the
// mathematics of common/channel_ops.h, with a count that was counted on the device.
#pragma once

#include "part_sums.cuh"

namespace bnext::cuda {

// The map's coefficient j of a part's channel.
__device__ __forceinline__ double* part_coefficient(const PartArgs& args, std::int64_t part, int j, std::int64_t c) {
  return args.workspace + args.plan.workspace.coefficients + (part * kMaxCoefficients + j) * args.plan.C + c;
}

// A part that holds nothing but padding has no statistics: zeros are saved, and running statistics are not updated.
__device__ __forceinline__ void finish_part(TrainingForwardOp op, std::int64_t c, const LocalStats& stats,
                                            double (&coefficients)[kMaxCoefficients]) {
  op.count = stats.count;
  if (c == 0 && op.args.save_count != nullptr) *op.args.save_count = stats.count;
  if (stats.count > 0.0) {
    op.finish(c, ChannelSums{stats.mean, 0.0, stats.m2}, /*stores=*/true, coefficients);
    return;
  }
  op.args.save_mean[c] = 0.0;
  if (op.args.save_invstd != nullptr) op.args.save_invstd[c] = 0.0;
  if (op.args.save_m2 != nullptr) op.args.save_m2[c] = 0.0;
}

__device__ __forceinline__ void finish_part(const EvalForwardOp& op, std::int64_t c, const GradientSums&,
                                            double (&coefficients)[kMaxCoefficients]) {
  op.finish(c, ChannelSums{}, /*stores=*/true, coefficients);
}

// The gradients of a part that holds nothing but padding are zeros, and no coefficient of it is used.
__device__ __forceinline__ void finish_part(BackwardOp op, std::int64_t c, const GradientSums& sums,
                                            double (&coefficients)[kMaxCoefficients]) {
  op.count = sums.count;
  double shift[kMaxReduceCoefficients] = {};
  op.reduce_coefficients(c, shift);
  op.finish(c, ChannelSums{shift[0], sums.first, sums.second}, /*stores=*/true, coefficients);
}

// A block finishes kFinishChannels channels of a part; its threads merge their `splits` partial sums, of which there
// are none where nothing is reduced.
template <typename Op>
__global__ void __launch_bounds__(kPartThreads)
    part_finish_kernel(const __grid_constant__ PartArgs args, const __grid_constant__ Op op,
                       const std::int64_t splits) {
  BNEXT_DYNAMIC_SHARED(bytes);
  const PartPlan& plan = args.plan;
  const int t = static_cast<int>(threadIdx.x);
  const std::int64_t part = blockIdx.x % plan.parts;
  const std::int64_t c = blockIdx.x / plan.parts * kFinishChannels + t % kFinishChannels;
  PartialOf<Op> sums;
  if (splits > 0) {
    const PartialOf<Op>* partials = partials_of<Op>(args) + part * splits * plan.C + c;
    for (std::int64_t split = t / kFinishChannels; split < splits && c < plan.C; split += kFinishRows) {
      sums.merge(partials[split * plan.C]);
    }
    sums = merge_rows(sums, reinterpret_cast<PartialOf<Op>*>(bytes), kFinishChannels, kFinishRows);
  }
  if (t >= kFinishChannels || c >= plan.C) return;
  if (c == 0) args.workspace[plan.workspace.counts + part] = sums.count;
  double coefficients[kMaxCoefficients] = {};
  finish_part(of_part(op, part, plan.C), c, sums, coefficients);
#pragma unroll
  for (int j = 0; j < kMaxCoefficients; ++j) *part_coefficient(args, part, j, c) = coefficients[j];
}

// Combines the parts' running statistics, or their parameter gradients, with one thread per channel.
template <typename Op>
__global__ void __launch_bounds__(kPartThreads) part_totals_kernel(const __grid_constant__ Op op) {
  const std::int64_t c = std::int64_t{blockIdx.x} * kPartThreads + threadIdx.x;
  if (c < op.C) op.finish(c);
}

}  // namespace bnext::cuda
