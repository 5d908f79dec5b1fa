// The sums of each channel over each part: a block adds up a chunk of a part for up to kPartChannels channels.
//
// All sums are in float64, so that no channel is reduced again, as may happen in the kernel of launch_plan.h. The order
// of additions and merges depends on the plan alone. Bytes read: the functor's inputs where there is no padding, and a
// byte of `valid` for each element, from L2 for all channels but the first.
#pragma once

#include "../common/channel_ops.h"
#include "../common/samples.h"
#include "part_place.cuh"

namespace bnext::cuda {

// Sums of gradients, all shifted by the same value.
struct GradientSums {
  double count = 0.0;
  double first = 0.0;
  double second = 0.0;

  __device__ __forceinline__ void merge(const GradientSums& other) {
    count += other.count;
    first += other.first;
    second += other.second;
  }
};

// The partial result of a thread, a block or all blocks, for a channel of a part. Moments are merged by Chan's formula
// (LocalStats), because each thread shifts by a value of its own.
template <typename Op>
using PartialOf = std::conditional_t<std::is_same_v<Op, TrainingForwardOp>, LocalStats, GradientSums>;
static_assert(sizeof(LocalStats) == kPartialDoubles * sizeof(double) && sizeof(GradientSums) == sizeof(LocalStats));

// A thread's first valid value is its shift: the square of a shifted value is at most twice the sum of all squares of
// distances from the mean, so that float64 holds it. An infinite value shifts nothing (common/samples.h).
__device__ __forceinline__ double first_shift(double value) { return is_finite(value) ? value : 0.0; }

__device__ __forceinline__ LocalStats stats_of(const ChannelSums& sums, double count) {
  if (count == 0.0) return {};
  const Moments<double> moments = moments_from_sums(sums, count);
  return {count, moments.mean, moments.var * count};
}

// Merges the results of the threads with the same threadIdx.x % columns, where a block has columns*rows threads and
// `rows` is a power of two. The first `columns` threads return the merged results.
template <typename Partial>
__device__ __forceinline__ Partial merge_rows(Partial mine, Partial* shared, int columns, int rows) {
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = mine;
  __syncthreads();
  for (int half = rows / 2; half > 0; half /= 2) {
    if (t < half * columns) {
      mine.merge(shared[t + half * columns]);
      shared[t] = mine;
    }
    __syncthreads();
  }
  return mine;
}

// `op` for one part, with its pointers moved on to the part's statistics and gradients.
__device__ __forceinline__ TrainingForwardOp of_part(TrainingForwardOp op, std::int64_t part, std::int64_t C) {
  op.args.save_mean += 2 * part * C;
  if (op.args.save_invstd != nullptr) op.args.save_invstd += 2 * part * C;
  if (op.args.save_m2 != nullptr) op.args.save_m2 += part * C;
  return op;
}

template <typename Data>
__device__ __forceinline__ Data* advanced(Data* data, std::int64_t values, DType dtype) {
  if (data == nullptr) return nullptr;
  return dispatch(dtype, [&](auto tag) -> Data* {
    using T = typename decltype(tag)::Type;
    return static_cast<std::conditional_t<std::is_const_v<Data>, const T*, T*>>(data) + values;
  });
}

// Where there are several parts, the given statistics are those that an earlier call has saved.
__device__ __forceinline__ EvalForwardOp of_part(EvalForwardOp op, std::int64_t part, std::int64_t C) {
  const std::int64_t stats = 2 * part * C;
  op.args.running_mean.data = advanced(op.args.running_mean.data, stats, op.args.running_mean.dtype);
  op.args.invstd.data = advanced(op.args.invstd.data, stats, op.args.invstd.dtype);
  op.args.save_mean += stats;
  op.args.save_invstd += stats;
  return op;
}

// Where there are several parts, each has gradients of its own in the workspace.
__device__ __forceinline__ BackwardOp of_part(BackwardOp op, std::int64_t part, std::int64_t C) {
  op.args.save_mean += 2 * part * C;
  op.args.save_invstd += 2 * part * C;
  op.args.grad_weight.data = advanced(op.args.grad_weight.data, part * C, op.args.grad_weight.dtype);
  op.args.grad_bias.data = advanced(op.args.grad_bias.data, part * C, op.args.grad_bias.dtype);
  return op;
}

template <typename Op>
__device__ __forceinline__ PartialOf<Op>* partials_of(const PartArgs& args) {
  return reinterpret_cast<PartialOf<Op>*>(args.workspace + args.plan.workspace.partials);
}

template <typename scalar_t, typename Reduce, typename Op>
__global__ void __launch_bounds__(kPartThreads)
    part_sums_kernel(const __grid_constant__ PartArgs args, const __grid_constant__ Op op) {
  constexpr bool kSamples = std::is_same_v<Op, TrainingForwardOp>;
  BNEXT_DYNAMIC_SHARED(bytes);
  const PartPlan& plan = args.plan;
  PartPlace place(plan);
  double c[kMaxReduceCoefficients] = {};
  if constexpr (Reduce::kCoefficients > 0 && !kSamples) {
    if (place.has_channel()) of_part(op, place.part(), plan.C).reduce_coefficients(place.channel(), c);
  }
  GradientSums sums;
  for_each_element<scalar_t, Reduce>(args, place, [&](const PartElement& element, const double (&in)[kMaxInputs]) {
    if (!element.valid) return;
    if constexpr (kSamples) {
      if (sums.count == 0.0) c[0] = first_shift(in[0]);
    }
    Reduce::template add<scalar_t>(sums.first, sums.second, in, c, args.epilogue);
    sums.count += 1.0;
  });
  PartialOf<Op> mine;
  if constexpr (kSamples) {
    mine = stats_of({c[0], sums.first, sums.second}, sums.count);
  } else {
    mine = sums;
  }
  auto* const shared = reinterpret_cast<PartialOf<Op>*>(bytes);
  mine = merge_rows(mine, shared, plan.threads_x, plan.threads_y);
  if (static_cast<int>(threadIdx.x) < plan.threads_x && place.has_channel()) {
    partials_of<Op>(args)[(place.part() * plan.splits + place.split()) * plan.C + place.channel()] = mine;
  }
}

}  // namespace bnext::cuda
