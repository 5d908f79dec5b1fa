// The vectors of a tile that a thread works on, in order (launch_plan.h).
#pragma once

#include <cstdint>
#include <type_traits>

#include "vec.cuh"

namespace bnext::cuda {

// The columns of one tile. What follows from the tile's number is computed at each use, rather than held in registers.
struct TileSpan {
  std::int64_t tile;

  __device__ __forceinline__ std::int64_t first_channel(const LaunchPlan& plan) const {
    return tile * plan.tile_channels;
  }
  __device__ __forceinline__ int channels(const LaunchPlan& plan) const {
    const std::int64_t left = plan.C - first_channel(plan);
    return left < plan.tile_channels ? static_cast<int>(left) : plan.tile_channels;
  }
  __device__ __forceinline__ std::int64_t width(const LaunchPlan& plan) const {
    const std::int64_t begin = tile * plan.tile_width;
    return begin + plan.tile_width < plan.row_width ? plan.tile_width : plan.row_width - begin;
  }
};

// kWhole: the plan promises whole vectors, which are counted in 32 bits. Otherwise elements are counted, in 64 bits.
template <typename scalar_t, Tile kTile, bool kWhole>
class TileIterator {
  static constexpr int kN = kLanes<scalar_t>;
  static constexpr int kUnit = kWhole ? kN : 1;
  static constexpr bool kParts = kTile == Tile::kChannel;  // elsewhere a thread stays in its columns
  using Index = std::conditional_t<kWhole, unsigned, std::int64_t>;
  using Count = std::conditional_t<kWhole, int, std::int64_t>;  // 64-bit divisions take a hundred instructions

 public:
  __device__ __forceinline__ TileIterator(const LaunchPlan& plan, const TileSpan& span, std::int64_t tile, int rank,
                                          int thread)
      : plan_(plan), span_(span) {
    const int x = thread % plan.threads_x;
    const int y = thread / plan.threads_x;
    const Count unit = Count{rank} * plan.threads_y + y;
    items_ = y < plan.threads_y ? plan.full_steps + (unit < plan.partial_step ? 1 : 0) : 0;
    const std::int64_t row = kParts ? unit / plan.parts : unit;
    part_ = kParts ? static_cast<int>(unit % plan.parts) : 0;
    const std::int64_t vector = std::int64_t{part_} * plan.threads_x + x;  // of the row
    at_ = static_cast<Index>((row * plan.row_width + tile * plan.tile_width) / kUnit + vector * (kN / kUnit));
    mask_ = static_cast<Index>(row * plan.mask_row + tile * plan.mask_tile + vector);
  }

  // Steps this thread takes.
  __device__ __forceinline__ int items() const { return items_; }

  // From the first step to the k-th.
  __device__ __forceinline__ void seek(int steps) {
    const Count part = part_ + Count{steps} * plan_.part_step;
    const std::int64_t k = steps;
    const std::int64_t wraps = kParts ? part / plan_.parts : 0;
    at_ += static_cast<Index>((k * plan_.vector_step + wraps * plan_.vector_wrap) / kUnit);
    mask_ += static_cast<Index>(k * plan_.mask_step + wraps * plan_.mask_wrap);
    part_ = kParts ? static_cast<int>(part % plan_.parts) : 0;
  }

  __device__ __forceinline__ void next() {
    at_ += static_cast<Index>(plan_.vector_step / kUnit);
    mask_ += static_cast<Index>(plan_.mask_step);
    if (!kParts) return;
    part_ += plan_.part_step;
    if (part_ >= plan_.parts) {
      part_ -= plan_.parts;
      at_ += static_cast<Index>(plan_.vector_wrap / kUnit);
      mask_ += static_cast<Index>(plan_.mask_wrap);
    }
  }

  __device__ __forceinline__ void prev() {
    at_ -= static_cast<Index>(plan_.vector_step / kUnit);
    mask_ -= static_cast<Index>(plan_.mask_step);
    if (!kParts) return;
    part_ -= plan_.part_step;
    if (part_ < 0) {
      part_ += plan_.parts;
      at_ -= static_cast<Index>(plan_.vector_wrap / kUnit);
      mask_ -= static_cast<Index>(plan_.mask_wrap);
    }
  }

  __device__ __forceinline__ auto segment() const {
    if constexpr (kWhole) {
      return WholeSegment<scalar_t>{at_, mask_};
    } else {
      const int x = static_cast<int>(threadIdx.x) % plan_.threads_x;
      const std::int64_t column = kParts ? (std::int64_t{part_} * plan_.threads_x + x) * kN : x * kN;
      const std::int64_t row = at_ - column;  // its first element
      const std::int64_t end = row + span_.width(plan_) < plan_.numel ? row + span_.width(plan_) : plan_.numel;
      // A single channel may begin anywhere: its vectors are cut at 16-byte boundaries. Columns are cut into vectors
      // from the tile's first one on.
      const std::int64_t offset = (kTile == Tile::kChannel ? row - row % kN : row) + column;
      return Segment<scalar_t>{offset, mask_, within(row - offset), within(end - offset)};
    }
  }

 private:
  __device__ __forceinline__ static int within(std::int64_t lane) {
    return lane < 0 ? 0 : lane < kN ? static_cast<int>(lane) : kN;
  }

  const LaunchPlan& plan_;
  const TileSpan& span_;
  int items_;
  Index at_;    // the vector, in units of kUnit elements
  Index mask_;  // the vector's byte in a mask
  int part_;
};

}  // namespace bnext::cuda
