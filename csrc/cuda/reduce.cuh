// A channel's two sums: in a thread's registers, then over the threads of a block.
//
// A register takes kChain float32 additions and is then added to a double (float64 data: doubles throughout). The
// threads' doubles are merged in an order that the plan alone decides.
#pragma once

#include <type_traits>

#include "activation_lanes.cuh"
#include "block_sum.cuh"
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

  // Calls step(slot), which adds a vector, for each slot of [slot, end) in order, and flushes when the chains are full.
  template <typename Step>
  __device__ __forceinline__ void for_each(int slot, int end, Step&& step) {
    while (slot < end) {
      const int stop = end - slot < room_ ? end : slot + room_;
      room_ -= stop - slot;
#pragma unroll 1
      for (; slot < stop; ++slot) step(slot);
      if (room_ == 0) flush();
    }
  }

  // Lanes outside [low, high) do not belong to the tile.
  __device__ __forceinline__ void add(const Item& item, int low, int high) {
    if constexpr (!kIsOpmath<scalar_t, acc_t>) {
      add_wide(item, low, high);
    } else if constexpr (Reduce::kActivated) {
      add_activated(item);
    } else {
      add_plain(item, low, high);
    }
  }

  // To be called before the sums are read.
  __device__ __forceinline__ void flush() {
    if constexpr (kChains) {
#pragma unroll
      for (int e = 0; e < kN; ++e) {
        const int p = kP == 1 ? 0 : e;
        first[p] += static_cast<double>(chain_first_[e]);
        second[p] += static_cast<double>(chain_second_[e]);
        chain_first_[e] = chain_second_[e] = 0.0f;
      }
    }
    room_ = kChain;
  }

  double first[kP];
  double second[kP];

 private:
  __device__ __forceinline__ void add_plain(const Item& item, int low, int high) {
    Inputs<scalar_t> in = {};
    acc_t c[kN][kMaxReduceCoefficients] = {};
    widen_inputs<scalar_t, Reduce>(item, in);
    coefficients_.get(0, kN, c);
    const auto add_lane = [&](int e) {
      acc_t lane[kMaxInputs];
      lane_of<scalar_t>(in, e, lane);
      Reduce::template add<scalar_t>(first_of(e), second_of(e), lane, c[e], epilogue_);
    };
    if (low == 0 && high == kN) {
#pragma unroll
      for (int e = 0; e < kN; ++e) add_lane(e);
    } else {
#pragma unroll
      for (int e = 0; e < kN; ++e) {
        if (e >= low && e < high) add_lane(e);
      }
    }
  }

  // Lanes outside the tile are not tested for: their dy is zero, and so are their terms.
  __device__ __forceinline__ void add_activated(const Item& item) {
    constexpr int kAtOnce = kLanesAtOnce<scalar_t, kTile>;
    Inputs<scalar_t> in = {};
    acc_t c[kN][kMaxReduceCoefficients] = {};
    Lanes<scalar_t> dz;
    widen_inputs<scalar_t, Reduce>(item, in);
#pragma unroll
    for (int begin = 0; begin < kN; begin += kAtOnce) {
      const int end = begin + kAtOnce;
      dz_lanes<scalar_t, Reduce, kMaxReduceCoefficients>(begin, end, item, in, coefficients_, epilogue_, dz);
      coefficients_.get(begin, end, c);
#pragma unroll
      for (int e = begin; e < end; ++e) {
        acc_t lane[kMaxInputs];
        lane_of<scalar_t>(in, e, lane);
        Reduce::add_given(dz[e], first_of(e), second_of(e), lane, c[e]);
      }
    }
  }

  __device__ __forceinline__ void add_wide(Item item, int low, int high) {
    // Where lanes have sums of their own, these are registers, whose index must be a compile-time constant.
#pragma unroll(kP)
    for (int e = 0; e < kN; ++e) {
      acc_t lane[kMaxInputs] = {};
      acc_t c[kMaxReduceCoefficients] = {};
      take_wide_lane<scalar_t, Reduce>(item, epilogue_, lane);
      if (e < low || e >= high) continue;
      coefficients_.get_one(e, c);
      Reduce::template add<scalar_t>(first_of(e), second_of(e), lane, c, epilogue_);
    }
  }

  __device__ __forceinline__ acc_t& first_of(int e) {
    if constexpr (kChains) {
      return chain_first_[e];
    } else {
      return first[kP == 1 ? 0 : e];
    }
  }
  __device__ __forceinline__ acc_t& second_of(int e) {
    if constexpr (kChains) {
      return chain_second_[e];
    } else {
      return second[kP == 1 ? 0 : e];
    }
  }

  Epilogue epilogue_;
  LaneCoefficients<scalar_t, acc_t, kTile, kKeep<scalar_t, acc_t, Reduce, kTile>, Reduce::kCoefficients> coefficients_;
  float chain_first_[kChains ? kN : 1] = {};
  float chain_second_[kChains ? kN : 1] = {};
  int room_ = kChain;
};

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

// The rows of a block's threads in merge_columns, and which of its columns' sums a thread has.
struct ThreadRows {
  int length;  // threads of a row
  int rows;
  int count;  // sums of this thread
  int first;  // the index of the first of them
};

// Merges the rows that share a warp, in registers, until a warp is one row: of two rows, a column's threads exchange
// values, and each adds up one half of them.
template <int kHalf, int kValues>
__device__ __forceinline__ void merge_rows_of_warp(double (&values)[kValues], ThreadRows& at) {
  if (at.length == 32) return;
  const bool upper = (static_cast<int>(threadIdx.x) & at.length) != 0;
#pragma unroll
  for (int p = 0; p < kHalf; ++p) {
    const double low = values[p];
    const double high = values[kHalf + p];
    values[p] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, at.length);
  }
  at = {2 * at.length, at.rows / 2, kHalf, at.first + (upper ? kHalf : 0)};
  if constexpr (kHalf > 1) merge_rows_of_warp<kHalf / 2>(values, at);
}

// Columns: first a sum over the rows of threads, then over the columns of each channel. own: double [2][tile_channels].
// Rows that share a warp are merged in registers. The rows that this leaves are merged through `merge`, by a tree
// reduction in which the upper half adds to the lower half, or as many rows as the buffer holds.
template <int kP>
__device__ __forceinline__ void merge_columns(const LaunchPlan& plan, const double (&first)[kP],
                                              const double (&second)[kP], double* merge, double* own) {
  constexpr int kValues = 2 * kP;
  const int t = static_cast<int>(threadIdx.x);
  double values[kValues];
#pragma unroll
  for (int p = 0; p < kP; ++p) {
    values[p] = first[p];
    values[kP + p] = second[p];
  }
  ThreadRows at = {plan.threads_x, plan.threads_y, kValues, 0};
  if (32 % plan.threads_x == 0 && plan.workers == plan.threads) merge_rows_of_warp<kP>(values, at);
  const int y = t / at.length;
  const int slots = at.length * plan.merge_rows;
  while (at.rows > 1) {
    const int left = at.rows / 2 < plan.merge_rows ? (at.rows + 1) / 2 : at.rows - plan.merge_rows;
    if (y >= left && y < at.rows) {
#pragma unroll
      for (int p = 0; p < kValues; ++p) {
        if (p < at.count) merge[p * slots + t - left * at.length] = values[p];
      }
    }
    __syncthreads();
    if (y < at.rows - left) {
#pragma unroll
      for (int p = 0; p < kValues; ++p) {
        if (p < at.count) values[p] += merge[p * slots + t];
      }
    }
    __syncthreads();
    at.rows = left;
  }
  const int columns = plan.threads_x * kP;
  if (y == 0) {
    const int column = t % plan.threads_x * kP;
#pragma unroll
    for (int p = 0; p < kValues; ++p) {
      const int value = at.first + p;
      if (p < at.count) merge[value / kP * columns + column + value % kP] = values[p];
    }
  }
  __syncthreads();
  // A channel's columns: runs of columns_per_channel, one for each time the channels repeat in a folded row.
  const int run = static_cast<int>(plan.columns_per_channel);
  const int each = static_cast<int>(plan.tile_width) / plan.tile_channels;
  sum_parts(
      plan.threads, 2 * plan.tile_channels, each,
      [&](int i, int j) {
        const double* sums = merge + i / plan.tile_channels * columns + i % plan.tile_channels * run;
        return sums[j / run * plan.tile_channels * run + j % run];
      },
      [&](int i, double sum) { own[i] = sum; });
}

}  // namespace bnext::cuda
