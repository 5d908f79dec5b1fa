// The vectors of a tile that a thread works on, in order (launch_plan.h).
#pragma once

#include <cstdint>

#include "vec.cuh"

namespace bnext::cuda {

// The columns of one tile.
struct TileSpan {
  std::int64_t tile;
  int channels;

  __device__ __forceinline__ TileSpan(const LaunchPlan& plan, std::int64_t tile) : tile(tile) {
    const std::int64_t left = plan.C - first_channel(plan);
    channels = left < plan.tile_channels ? static_cast<int>(left) : plan.tile_channels;
  }

  // Computed where they are wanted, rather than held in registers all the time.
  __device__ __forceinline__ std::int64_t first_channel(const LaunchPlan& plan) const {
    return tile * plan.tile_channels;
  }
  __device__ __forceinline__ std::int64_t width(const LaunchPlan& plan) const {
    const std::int64_t begin = tile * plan.tile_width;
    return begin + plan.tile_width < plan.row_width ? plan.tile_width : plan.row_width - begin;
  }
};

template <typename scalar_t, Tile kTile>
class TileIterator {
  static constexpr int kN = kLanes<scalar_t>;
  static constexpr bool kParts = kTile == Tile::kChannel;  // a thread keeps to its columns elsewhere

 public:
  __device__ __forceinline__ TileIterator(const LaunchPlan& plan, const TileSpan& span, std::int64_t tile, int rank)
      : plan_(plan), span_(span) {
    const int x = static_cast<int>(threadIdx.x) % plan.threads_x;
    const int y = static_cast<int>(threadIdx.x) / plan.threads_x;
    const std::int64_t units = plan.rows * plan.parts;
    const std::int64_t unit = std::int64_t{rank} * plan.threads_y + y;
    items_ = y < plan.threads_y && unit < units ? (units - unit + plan.step - 1) / plan.step : 0;
    row_ = unit / plan.parts * plan.row_width + tile * plan.tile_width;
    mask_row_ = unit / plan.parts * plan.mask_row + tile * plan.mask_tile;
    part_ = static_cast<int>(unit % plan.parts);
    x_ = x * kN;
  }

  // Steps this thread takes.
  __device__ __forceinline__ std::int64_t items() const { return items_; }

  // From the first step to the k-th.
  __device__ __forceinline__ void seek(std::int64_t k) {
    const std::int64_t part = part_ + k * plan_.part_step;
    row_ += k * plan_.row_step + part / plan_.parts * plan_.row_width;
    mask_row_ += k * plan_.mask_row_step + part / plan_.parts * plan_.mask_row;
    part_ = static_cast<int>(part % plan_.parts);
  }

  __device__ __forceinline__ void next() {
    row_ += plan_.row_step;
    mask_row_ += plan_.mask_row_step;
    if (!kParts || plan_.parts == 1) return;
    part_ += plan_.part_step;
    if (part_ >= plan_.parts) {
      part_ -= plan_.parts;
      row_ += plan_.row_width;
      mask_row_ += plan_.mask_row;
    }
  }

  __device__ __forceinline__ void prev() {
    row_ -= plan_.row_step;
    mask_row_ -= plan_.mask_row_step;
    if (!kParts || plan_.parts == 1) return;
    part_ -= plan_.part_step;
    if (part_ < 0) {
      part_ += plan_.parts;
      row_ -= plan_.row_width;
      mask_row_ -= plan_.mask_row;
    }
  }

  __device__ __forceinline__ Segment segment() const {
    const std::int64_t column = kParts ? std::int64_t{part_} * plan_.threads_x * kN + x_ : x_;
    const std::int64_t mask = mask_row_ + column / kN;
    if (plan_.whole) return {row_ + column, mask, 0, kN, true};
    const std::int64_t end = row_ + span_.width(plan_) < plan_.numel ? row_ + span_.width(plan_) : plan_.numel;
    // A single channel may begin anywhere: its vectors are cut where memory has its words. Columns are cut from the
    // tile's first one on.
    const std::int64_t offset = (kTile == Tile::kChannel ? row_ - row_ % kN : row_) + column;
    const int low = within(row_ - offset);
    const int high = within(end - offset);
    return {offset, mask, low, high, low == 0 && high == kN && offset % kN == 0};
  }

 private:
  __device__ __forceinline__ static int within(std::int64_t lane) {
    return lane < 0 ? 0 : lane < kN ? static_cast<int>(lane) : kN;
  }

  const LaunchPlan& plan_;
  const TileSpan& span_;
  std::int64_t items_;
  std::int64_t row_;       // its first element
  std::int64_t mask_row_;  // the row's and the tile's first byte in a mask
  int part_;
  int x_;
};

}  // namespace bnext::cuda
