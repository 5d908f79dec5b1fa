// The launch geometry of the kernels for padding and for batches of several parts (common/problem.h), and what their
// workspace holds. A pure function of the problem: results are the same bits on every device.
//
// Memory is seen as images of `plane` positions, in which the channels of a position lie `plane` elements apart:
// element (image, c, spot) lies at (image*C + c)*plane + spot. In channels-last memory a pixel is an image of one
// position, so that the formula serves both layouts.
#pragma once

#include <cstdint>
#include <string>

#include "../common/problem.h"
#include "workspace.h"

namespace bnext::cuda {

// A thread works on one channel. Neighbouring threads take neighbouring elements: up to kPartChannels channels of a
// pixel (channels last), or positions of a plane.
constexpr int kPartThreads = 256;
constexpr int kPartChannels = 32;

// A block merges the partial sums of kFinishChannels channels of a part, with kFinishRows threads for each channel.
constexpr int kFinishChannels = 16;
constexpr int kFinishRows = kPartThreads / kFinishChannels;

// A block's partial result for a channel of a part: a count and two sums, or LocalStats.
constexpr int kPartialDoubles = 3;

// Offsets into the workspace, in doubles.
struct PartWorkspace {
  std::int64_t partials;      // (parts, splits, C, kPartialDoubles)
  std::int64_t coefficients;  // (parts, kMaxCoefficients, C), the map's
  std::int64_t m2;            // (parts, C), as are the gradients; only for several parts
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
  int mask_threads;             // neighbouring threads that share a byte

  // A block takes a tile of threads_x channels, and a chunk of a part's positions.
  int threads_x;
  int threads_y;
  std::int64_t tiles;
  std::int64_t splits;
  std::int64_t chunk;        // positions in padded planes, a multiple of threads_y
  std::int64_t step_images;  // with step_spots: threads_y positions further on
  std::int64_t step_spots;
  std::int64_t image_elements;

  PartWorkspace workspace;
  WorkspaceSize workspace_size;

  int threads() const { return threads_x * threads_y; }
  std::int64_t blocks() const { return tiles * splits * parts; }
  std::int64_t finish_blocks() const { return (C + kFinishChannels - 1) / kFinishChannels * parts; }
};

// Whether a call runs these kernels, rather than the one of launch_plan.h.
inline bool has_parts(const Problem& problem) { return problem.valid != nullptr || problem.parts() > 1; }

PartPlan make_part_plan(const Problem& problem);

std::string description(const PartPlan& plan);

}  // namespace bnext::cuda
