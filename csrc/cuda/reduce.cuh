// A channel's two sums: in a thread's registers, then over the threads of a block.
//
// A register takes kChain float32 additions and is then added to a double (float64 data: doubles throughout). The
// threads' doubles are merged in an order that the plan alone decides.
#pragma once

#include <type_traits>

#include "coefficients.cuh"

namespace bnext::cuda {

constexpr int kChain = 16;

template <typename scalar_t, typename acc_t, typename Reduce, Tile kTile>
class Accumulator {
  static constexpr int kN = kLanes<scalar_t>;
  static constexpr int kP = kSums<scalar_t, kTile>;
  static constexpr bool kChains = std::is_same_v<acc_t, float>;

 public:
  // coefficients: double [Reduce::kCoefficients][tile_channels], in shared memory; columns: coefficients.cuh
  __device__ __forceinline__ Accumulator(const LaunchPlan& plan, const TileSpan& span, const double* coefficients,
                                         const void* columns, const Epilogue& epilogue)
      : epilogue_(epilogue), coefficients_(plan, span, coefficients, columns) {
#pragma unroll
    for (int p = 0; p < kP; ++p) first[p] = second[p] = 0.0;
  }

  __device__ __forceinline__ void add(const Segment& segment, const Item<scalar_t>& item) {
    // Beyond a segment dy is zero, and so is what it adds.
    if (Reduce::kActivated || segment.whole) {
#pragma unroll
      for (int e = 0; e < kN; ++e) add_lane(e, item);
    } else {
#pragma unroll
      for (int e = 0; e < kN; ++e) {
        if (e >= segment.low && e < segment.high) add_lane(e, item);
      }
    }
    if (kChains && ++length_ == kChain) flush();
  }

  // Before the sums are looked at.
  __device__ __forceinline__ void flush() {
    if constexpr (kChains) {
#pragma unroll
      for (int e = 0; e < kN; ++e) {
        const int p = kP == 1 ? 0 : e;
        first[p] += static_cast<double>(chain_first_[e]);
        second[p] += static_cast<double>(chain_second_[e]);
        chain_first_[e] = chain_second_[e] = 0.0f;
      }
      length_ = 0;
    }
  }

  double first[kP];
  double second[kP];

 private:
  __device__ __forceinline__ void add_lane(int e, const Item<scalar_t>& item) {
    acc_t in[kMaxInputs] = {};
    widen_lane<Reduce>(item, e, epilogue_, in);
    acc_t c[kMaxReduceCoefficients] = {};
    coefficients_.get(e, c);
    const int p = kP == 1 ? 0 : e;
    if constexpr (kChains) {
      Reduce::template add<scalar_t>(chain_first_[e], chain_second_[e], in, c, epilogue_);
    } else {
      Reduce::template add<scalar_t>(first[p], second[p], in, c, epilogue_);
    }
  }

  const Epilogue& epilogue_;
  LaneCoefficients<scalar_t, acc_t, kTile, kKeep<scalar_t, acc_t, Reduce, kTile>, Reduce::kCoefficients> coefficients_;
  float chain_first_[kChains ? kN : 1] = {};
  float chain_second_[kChains ? kN : 1] = {};
  int length_ = 0;
};

__device__ __forceinline__ double warp_sum(double value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

// One channel: own[0], own[1] become the sums of all threads' first and second.
__device__ __forceinline__ void merge_channel(const LaunchPlan& plan, const double (&first)[1],
                                              const double (&second)[1], double* merge, double* own) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const double a = warp_sum(first[0]);
  const double b = warp_sum(second[0]);
  if (threadIdx.x % 32 == 0) {
    merge[2 * warp] = a;
    merge[2 * warp + 1] = b;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    double sum = 0.0;
    for (int w = 0; w < plan.threads / 32; ++w) sum += merge[2 * w + static_cast<int>(threadIdx.x)];
    own[threadIdx.x] = sum;
  }
}

// Columns: first the threads that share them, upper rows giving to lower ones, again and again: half of them, as far as
// the buffer has room; then the columns of each channel. own: double [2][tile_channels].
template <int kP>
__device__ __forceinline__ void merge_columns(const LaunchPlan& plan, double (&first)[kP], double (&second)[kP],
                                              double* merge, double* own) {
  const int t = static_cast<int>(threadIdx.x);
  const int y = t / plan.threads_x;
  const int slots = plan.threads_x * plan.merge_rows;
  for (int rows = plan.threads_y; rows > 1;) {
    const int left = rows / 2 < plan.merge_rows ? (rows + 1) / 2 : rows - plan.merge_rows;
    if (y >= left && y < rows) {
#pragma unroll
      for (int p = 0; p < kP; ++p) {
        merge[2 * p * slots + t - left * plan.threads_x] = first[p];
        merge[(2 * p + 1) * slots + t - left * plan.threads_x] = second[p];
      }
    }
    __syncthreads();
    if (y < rows - left) {
#pragma unroll
      for (int p = 0; p < kP; ++p) {
        first[p] += merge[2 * p * slots + t];
        second[p] += merge[(2 * p + 1) * slots + t];
      }
    }
    __syncthreads();
    rows = left;
  }
  const int columns = plan.threads_x * kP;
  if (y == 0) {
#pragma unroll
    for (int p = 0; p < kP; ++p) {
      merge[t * kP + p] = first[p];
      merge[columns + t * kP + p] = second[p];
    }
  }
  __syncthreads();
  // A channel's columns: runs of columns_per_channel, one for each time the channels repeat in a folded row. As many
  // threads as it has columns, up to a warp, add them up.
  const int run = static_cast<int>(plan.columns_per_channel);
  const int each = static_cast<int>(plan.tile_width) / plan.tile_channels;
  int lanes = 1;
  while (2 * lanes <= each && lanes < 32) lanes *= 2;
  const int at_once = plan.threads / lanes;
  for (int begin = 0; begin < 2 * plan.tile_channels; begin += at_once) {
    const int i = begin + t / lanes;
    double sum = 0.0;
    if (i < 2 * plan.tile_channels) {
      const double* sums = merge + i / plan.tile_channels * columns + i % plan.tile_channels * run;
      for (int j = t % lanes; j < each; j += lanes) sum += sums[j / run * plan.tile_channels * run + j % run];
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (t % lanes == 0 && i < 2 * plan.tile_channels) own[i] = sum;
  }
}

}  // namespace bnext::cuda
