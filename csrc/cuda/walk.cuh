// A thread's way through its tile: which vectors it takes, in which order (plan.h).
#pragma once

#include <cstdint>

#include "vec.cuh"

namespace bnext::cuda {

// The columns of one tile.
struct TileSpan {
  std::int64_t begin;
  std::int64_t end;
  std::int64_t first_channel;
  int channels;

  __device__ __forceinline__ TileSpan(const Plan& plan, std::int64_t tile) {
    begin = tile * plan.tile_width;
    end = begin + plan.tile_width < plan.row_width ? begin + plan.tile_width : plan.row_width;
    first_channel = tile * plan.tile_channels;
    const std::int64_t left = plan.C - first_channel;
    channels = left < plan.tile_channels ? static_cast<int>(left) : plan.tile_channels;
  }
};

template <typename scalar_t, Tile kTile>
class Walk {
 public:
  __device__ __forceinline__ Walk(const Plan& plan, const TileSpan& span, int rank)
      : plan_(plan), span_(span), x_(static_cast<int>(threadIdx.x) % plan.threads_x) {
    const int y = static_cast<int>(threadIdx.x) / plan.threads_x;
    const std::int64_t units = plan.rows * plan.parts;
    const std::int64_t step = std::int64_t{plan.threads_y} * plan.team_blocks;
    const std::int64_t unit = std::int64_t{rank} * plan.threads_y + y;
    items_ = y < plan.threads_y && unit < units ? (units - unit + step - 1) / step : 0;
    row_ = unit / plan.parts;
    part_ = unit % plan.parts;
    row_step_ = step / plan.parts;
    part_step_ = step % plan.parts;
  }

  // Steps this thread takes.
  __device__ __forceinline__ std::int64_t items() const { return items_; }

  // From the first step to the k-th.
  __device__ __forceinline__ void jump(std::int64_t k) {
    const std::int64_t part = part_ + k * part_step_;
    row_ += k * row_step_ + part / plan_.parts;
    part_ = part % plan_.parts;
  }

  __device__ __forceinline__ void advance() {
    row_ += row_step_;
    part_ += part_step_;
    if (part_ >= plan_.parts) {
      part_ -= plan_.parts;
      ++row_;
    }
  }

  __device__ __forceinline__ void retreat() {
    row_ -= row_step_;
    part_ -= part_step_;
    if (part_ < 0) {
      part_ += plan_.parts;
      --row_;
    }
  }

  __device__ __forceinline__ Segment segment() const {
    constexpr int kN = kLanes<scalar_t>;
    const std::int64_t row = row_ * plan_.row_width;
    const std::int64_t begin = row + span_.begin;
    const std::int64_t end = row + span_.end < plan_.numel ? row + span_.end : plan_.numel;
    // A single channel may begin anywhere: its vectors are cut where memory has its words. Columns are cut from the
    // tile's first one on.
    const std::int64_t origin = kTile == Tile::kChannel ? begin - begin % kN : begin;
    const std::int64_t offset = origin + (part_ * plan_.threads_x + x_) * kN;
    const std::int64_t low = begin - offset;
    const std::int64_t high = end - offset;
    return {offset, low > 0 ? static_cast<int>(low < kN ? low : kN) : 0,
            high < kN ? static_cast<int>(high > 0 ? high : 0) : kN};
  }

 private:
  const Plan& plan_;
  const TileSpan& span_;
  int x_;
  std::int64_t items_;
  std::int64_t row_;
  std::int64_t part_;
  std::int64_t row_step_;
  std::int64_t part_step_;
};

}  // namespace bnext::cuda
