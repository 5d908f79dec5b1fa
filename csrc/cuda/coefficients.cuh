// The coefficients of a thread's lanes, in the type that they are computed with, and where they wait.
#pragma once

#include <type_traits>

#include "tile_iterator.cuh"

namespace bnext::cuda {

// A channel for each thread, or for each of its lanes.
template <typename scalar_t, Tile kTile>
constexpr int kSums = kTile == Tile::kChannel ? 1 : kLanes<scalar_t>;

// The in-tile channel of a column. Beyond the last column that of any other: no element lies there.
__device__ __forceinline__ int column_channel(const LaunchPlan& plan, const TileSpan& span, int column) {
  const int channel = column / static_cast<int>(plan.columns_per_channel) % plan.tile_channels;
  return channel < span.channels ? channel : 0;
}

template <typename scalar_t, Tile kTile>
__device__ __forceinline__ int lane_channel(const LaunchPlan& plan, const TileSpan& span, int lane) {
  if (kTile == Tile::kChannel) return 0;
  return column_channel(plan, span, static_cast<int>(threadIdx.x) % plan.threads_x * kLanes<scalar_t> + lane);
}

// kRegisters: each lane's own; kChannels: in shared memory, a channel once; kColumns: in shared memory, a column once,
// so that neither they nor their channels' numbers take registers.
enum class Keep { kRegisters, kChannels, kColumns };

// Where a functor's coefficients wait: an activated one's are too many for the registers of a thread that has a channel
// for each lane, and so are float64 ones in a kernel that computes in float32 but for rare channels.
template <typename scalar_t, typename acc_t, typename Functor, Tile kTile>
constexpr Keep kKeep = Functor::kActivated && kTile == Tile::kColumns
                           ? (std::is_same_v<acc_t, opmath_t<scalar_t>> ? Keep::kColumns : Keep::kChannels)
                           : Keep::kRegisters;

// In shared memory for Keep::kColumns: [coefficient][lane][thread x], which no two threads of a warp's row read in the
// same bank.
template <typename acc_t>
__device__ __forceinline__ void spread_to_columns(const LaunchPlan& plan, const TileSpan& span, int lanes, int count,
                                                  const double* channels, acc_t* columns) {
  const int width = lanes * plan.threads_x;
  for (int i = static_cast<int>(threadIdx.x); i < count * width; i += plan.threads) {
    const int column = i % plan.threads_x * lanes + i % width / plan.threads_x;
    columns[i] = static_cast<acc_t>(channels[i / width * plan.tile_channels + column_channel(plan, span, column)]);
  }
  __syncthreads();
}

template <typename scalar_t, typename acc_t, Tile kTile, Keep kWhere, int kCount>
class LaneCoefficients {
  static constexpr bool kHeld = kWhere == Keep::kRegisters;
  static constexpr int kP = kSums<scalar_t, kTile>;

 public:
  // channels: double [kCount][tile_channels]; columns: acc_t, as above, Keep::kColumns only.
  __device__ __forceinline__ LaneCoefficients(const LaunchPlan& plan, const TileSpan& span, const double* channels,
                                              const void* columns)
      : plan_(plan),
        span_(span),
        channels_(channels),
        columns_(static_cast<const acc_t*>(columns) + static_cast<int>(threadIdx.x) % plan.threads_x) {
    if constexpr (kHeld) {
#pragma unroll
      for (int p = 0; p < kP; ++p) {
        const int channel = lane_channel<scalar_t, kTile>(plan, span, p);
#pragma unroll
        for (int j = 0; j < kCount; ++j) held_[p][j] = static_cast<acc_t>(channels[j * plan.tile_channels + channel]);
      }
    }
  }

  template <int kMax>
  __device__ __forceinline__ void get(int lane, acc_t (&c)[kMax]) const {
    const int p = kP == 1 ? 0 : lane;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if constexpr (kHeld) {
        c[j] = held_[p][j];
      } else if constexpr (kWhere == Keep::kColumns) {
        c[j] = columns_[(j * kLanes<scalar_t> + lane) * plan_.threads_x];
      } else {
        c[j] = static_cast<acc_t>(channels_[j * plan_.tile_channels + lane_channel<scalar_t, kTile>(plan_, span_, p)]);
      }
    }
  }

 private:
  const LaunchPlan& plan_;
  const TileSpan& span_;
  const double* channels_;
  const acc_t* columns_;
  acc_t held_[kHeld ? kP : 1][kCount > 0 ? kCount : 1];
};

}  // namespace bnext::cuda
