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
  static constexpr int kN = kLanes<scalar_t>;

 public:
  __device__ __forceinline__ Walk(const Plan& plan, const TileSpan& span, int rank) : plan_(plan), span_(span) {
    const int x = static_cast<int>(threadIdx.x) % plan.threads_x;
    const int y = static_cast<int>(threadIdx.x) / plan.threads_x;
    const std::int64_t units = plan.rows * plan.parts;
    const std::int64_t step = std::int64_t{plan.threads_y} * plan.team_blocks;
    const std::int64_t unit = std::int64_t{rank} * plan.threads_y + y;
    items_ = y < plan.threads_y && unit < units ? (units - unit + step - 1) / step : 0;
    row_ = unit / plan.parts * plan.row_width;
    part_ = static_cast<int>(unit % plan.parts);
    row_step_ = step / plan.parts * plan.row_width;
    part_step_ = static_cast<int>(step % plan.parts);
    x_ = x * kN;
  }

  // Steps this thread takes.
  __device__ __forceinline__ std::int64_t items() const { return items_; }

  // From the first step to the k-th.
  __device__ __forceinline__ void jump(std::int64_t k) {
    const std::int64_t part = part_ + k * part_step_;
    row_ += k * row_step_ + part / plan_.parts * plan_.row_width;
    part_ = static_cast<int>(part % plan_.parts);
  }

  __device__ __forceinline__ void advance() {
    row_ += row_step_;
    if (plan_.parts == 1) return;
    part_ += part_step_;
    if (part_ >= plan_.parts) {
      part_ -= plan_.parts;
      row_ += plan_.row_width;
    }
  }

  __device__ __forceinline__ void retreat() {
    row_ -= row_step_;
    if (plan_.parts == 1) return;
    part_ -= part_step_;
    if (part_ < 0) {
      part_ += plan_.parts;
      row_ -= plan_.row_width;
    }
  }

  __device__ __forceinline__ Segment segment() const {
    const std::int64_t begin = row_ + span_.begin;
    const std::int64_t column = std::int64_t{part_} * plan_.threads_x * kN + x_;
    if (plan_.whole) return {begin + column, 0, kN, true};
    const std::int64_t end = row_ + span_.end < plan_.numel ? row_ + span_.end : plan_.numel;
    // A single channel may begin anywhere: its vectors are cut where memory has its words. Columns are cut from the
    // tile's first one on.
    const std::int64_t offset = (kTile == Tile::kChannel ? begin - begin % kN : begin) + column;
    const int low = within(begin - offset);
    const int high = within(end - offset);
    return {offset, low, high, low == 0 && high == kN && offset % kN == 0};
  }

 private:
  __device__ __forceinline__ static int within(std::int64_t lane) {
    return lane < 0 ? 0 : lane < kN ? static_cast<int>(lane) : kN;
  }

  const Plan& plan_;
  const TileSpan& span_;
  std::int64_t items_;
  std::int64_t row_;  // its first element
  std::int64_t row_step_;
  int part_;
  int part_step_;
  int x_;
};

}  // namespace bnext::cuda
