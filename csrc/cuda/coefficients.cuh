// The coefficients of a thread's lanes, in the compute type, held in registers or in shared memory.
#pragma once

#include <type_traits>

#include "tile_iterator.cuh"

namespace bnext::cuda {

// Channels that a thread works on, with a pair of sums each: one for all of its lanes, or one for each lane.
template <typename scalar_t, Tile kTile>
constexpr int kSums = kTile == Tile::kChannel ? 1 : kLanes<scalar_t>;

// The channel of a column, counted within the tile. Beyond the last column any channel will do: no element lies there.
__device__ __forceinline__ int column_channel(const LaunchPlan& plan, const TileSpan& span, int column) {
  const int channel = column / static_cast<int>(plan.columns_per_channel) % plan.tile_channels;
  return channel < span.channels(plan) ? channel : 0;
}

template <typename scalar_t, Tile kTile>
__device__ __forceinline__ int lane_channel(const LaunchPlan& plan, const TileSpan& span, int lane) {
  if (kTile == Tile::kChannel) return 0;
  return column_channel(plan, span, static_cast<int>(threadIdx.x) % plan.threads_x * kLanes<scalar_t> + lane);
}

// kRegisters: one set for each of the thread's channels; kChannels: in shared memory, one set for each channel;
// kColumns: in shared memory, one set for each column, so that neither coefficients nor channel numbers take registers.
enum class Keep { kRegisters, kChannels, kColumns };

// Where a functor's coefficients are held. With a channel for each lane, those of an activated functor are too many for
// a thread's registers, as are the float64 ones in a kernel that computes in float32 but for rare channels.
template <typename scalar_t, typename acc_t, typename Functor, Tile kTile>
constexpr Keep kKeep =
    Functor::kActivated && kTile == Tile::kColumns ? (kIsOpmath<scalar_t, acc_t> ? Keep::kColumns : Keep::kChannels)
                                                   : Keep::kRegisters;

// Lanes whose coefficients are read from shared memory as one word. Two lanes of float64 would need too many registers.
template <typename scalar_t>
constexpr int kWordLanes = kLanes<scalar_t> < 4 ? 1 : 4;

// Fills shared memory for Keep::kColumns: [coefficient][word of lanes][thread x][lane of the word], so that a warp
// reads adjacent words.
template <typename scalar_t, typename acc_t>
__device__ __forceinline__ void spread_to_columns(const LaunchPlan& plan, const TileSpan& span, int count,
                                                  const double* channels, acc_t* columns) {
  constexpr int kL = kWordLanes<scalar_t>;
  const int words = kL * plan.threads_x;
  const int width = kLanes<scalar_t> * plan.threads_x;
  for (int i = static_cast<int>(threadIdx.x); i < count * width; i += plan.threads) {
    const int lane = i % width / words * kL + i % kL;
    const int column = i % words / kL * kLanes<scalar_t> + lane;
    columns[i] = static_cast<acc_t>(channels[i / width * plan.tile_channels + column_channel(plan, span, column)]);
  }
  __syncthreads();
}

// Lanes that go through an activation's backward pass together. With a channel for each lane, all lanes of a vector
// would need too many registers.
template <typename scalar_t, Tile kTile>
constexpr int kLanesAtOnce = kTile == Tile::kChannel ? kLanes<scalar_t> : kWordLanes<scalar_t>;

template <typename scalar_t, typename acc_t, Tile kTile, Keep kWhere, int kCount>
class LaneCoefficients {
  static constexpr bool kHeld = kWhere == Keep::kRegisters;
  static constexpr int kN = kLanes<scalar_t>;
  static constexpr int kL = kWordLanes<scalar_t>;
  static constexpr int kP = kSums<scalar_t, kTile>;

 public:
  // channels: double [kCount][tile_channels]; columns: acc_t, as above, Keep::kColumns only.
  __device__ __forceinline__ LaneCoefficients(const LaunchPlan& plan, const TileSpan& span, const double* channels,
                                              const void* columns)
      : plan_(plan),
        span_(span),
        channels_(channels),
        columns_(static_cast<const Word*>(columns) + static_cast<int>(threadIdx.x) % plan.threads_x) {
    if constexpr (kHeld) {
#pragma unroll
      for (int p = 0; p < kP; ++p) {
        const int channel = lane_channel<scalar_t, kTile>(plan, span, p);
#pragma unroll
        for (int j = 0; j < kCount; ++j) held_[p][j] = static_cast<acc_t>(channels[j * plan.tile_channels + channel]);
      }
    }
  }

  // The coefficients of the lanes [first, end), which are whole words.
  template <int kMax>
  __device__ __forceinline__ void get(int first, int end, acc_t (&c)[kN][kMax]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if constexpr (kWhere == Keep::kColumns) {
#pragma unroll
        for (int w = first / kL; w < end / kL; ++w) {
          const Word word = columns_[(j * (kN / kL) + w) * plan_.threads_x];
#pragma unroll
          for (int l = 0; l < kL; ++l) c[w * kL + l][j] = word.lane[l];
        }
      } else {
#pragma unroll
        for (int e = first; e < end; ++e) {
          static_assert(kHeld);
          c[e][j] = held_[kP == 1 ? 0 : e][j];
        }
      }
    }
  }

  // The coefficients of one lane. Unless each lane has its own in registers, e need not be a compile-time constant.
  template <int kMax>
  __device__ __forceinline__ void get_one(int e, acc_t (&c)[kMax]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      if constexpr (kHeld) {
        c[j] = held_[kP == 1 ? 0 : e][j];
      } else {
        static_assert(kWhere == Keep::kChannels);
        const int channel = lane_channel<scalar_t, kTile>(plan_, span_, e);
        c[j] = static_cast<acc_t>(channels_[j * plan_.tile_channels + channel]);
      }
    }
  }

 private:
  struct alignas(kL * sizeof(acc_t)) Word {
    acc_t lane[kL];
  };

  const LaunchPlan& plan_;
  const TileSpan& span_;
  const double* channels_;
  const Word* columns_;
  acc_t held_[kHeld ? kP : 1][kCount > 0 ? kCount : 1];
};

}  // namespace bnext::cuda
