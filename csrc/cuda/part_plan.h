// The launch geometry of the kernels for padding and for batches of several parts (common/problem.h), and what their
// workspace holds. A pure function of the problem: results are the same bits on every device.
//
// Memory is seen as images of `plane` positions, and a position's channels as `plane` elements apart from each other:
// element (image, c, spot) lies at (image*C + c)*plane + spot. Of channels-last memory a pixel is an image of one
// position, so that both layouts are one.
#pragma once

#include <cstdint>
#include <string>

#include "../common/problem.h"

namespace bnext::cuda {

// A thread keeps one channel. Neighbouring threads have neighbouring elements: channels of a pixel (channels last), up
// to kPartChannels of them, or positions.
constexpr int kPartThreads = 256;
constexpr int kPartChannels = 32;

// The partial sums of a part are merged by so many threads for each channel.
constexpr int kFinishChannels = 16;
constexpr int kFinishRows = kPartThreads / kFinishChannels;

// What a block knows of a channel's part: three numbers.
constexpr int kPartialDoubles = 3;

// Where the workspace holds what, in doubles.
struct PartWorkspace {
  std::int64_t partials;      // (parts, splits, C, kPartialDoubles)
  std::int64_t coefficients;  // (parts, kMaxCoefficients, C), the map's
  std::int64_t m2;            // (parts, C), as are the gradients: only of several parts
  std::int64_t grad_weight;
  std::int64_t grad_bias;
  std::int64_t counts;  // (parts)
};

struct PartPlan {
  const std::uint8_t* valid;  // (images, plane)
  bool channels_last;
  std::int64_t C;
  std::int64_t images;  // pixels in channels-last memory
  std::int64_t plane;
  std::int64_t padded_plane;  // a multiple of a mask's lanes, so that threads that share a byte share a warp
  std::int64_t parts;
  std::int64_t part_images;  // the last part may have fewer

  std::int64_t mask_row_bytes;  // common/mask.h
  int mask_threads;             // that share a byte

  // A block has threads_x channels, a tile, and of a part's positions a chunk.
  int threads_x;
  int threads_y;
  std::int64_t tiles;
  std::int64_t splits;
  std::int64_t chunk;        // positions in padded planes, a multiple of threads_y
  std::int64_t step_images;  // threads_y positions further on
  std::int64_t step_spots;
  std::int64_t image_elements;

  PartWorkspace workspace;
  std::int64_t workspace_bytes;

  int threads() const { return threads_x * threads_y; }
  std::int64_t blocks() const { return tiles * splits * parts; }
  std::int64_t finish_blocks() const { return (C + kFinishChannels - 1) / kFinishChannels * parts; }
};

// Whether these kernels are to run, and not the one of launch_plan.h.
inline bool has_parts(const Problem& problem) { return problem.valid != nullptr || problem.parts() > 1; }

PartPlan make_part_plan(const Problem& problem);

std::string description(const PartPlan& plan);

}  // namespace bnext::cuda
