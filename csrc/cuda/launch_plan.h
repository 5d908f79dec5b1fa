// Launch geometry, as pure host functions: how a call's elements are dealt out to tiles, groups, blocks and threads.
//
// Both layouts are seen as a matrix of dense rows.
//   channels last    row = a pixel, column j belongs to channel j % C; where C elements are no multiple of 16 bytes,
//                    several pixels are folded into one row that is a multiple
//   channels first   row = an image, column j belongs to channel j / HW
// A tile is a group of columns that holds all values of its channels, and is worked on by a group of blocks:
//   Tile::kChannel   one channel, whose rows have any length and any alignment (large planes)
//   Tile::kColumns   several channels; a thread stays in its columns in every row, so that it knows their channels
//                    (channels last, small planes)
// Within a tile rows are cut into vectors of 16 bytes. Thread t of a block starts at vector t % threads_x of row
// t / threads_x; a step moves the whole group on. A thread keeps `kept` vectors of each input in shared memory, in
// slots of its own that no other thread reads or writes. What does not fit is read again, last first, from L2.
#pragma once

#include <cstdint>
#include <string>

#include "../common/problem.h"
#include "../common/samples.h"
#include "workspace.h"

namespace bnext::cuda {

constexpr int kVectorBytes = 16;
// Two blocks an SM with half of its shared memory each, or one block with all of it and twice the threads: either way
// 128 registers a thread.
constexpr int kThreads = 256;
constexpr int kBlocksPerSM = 2;
constexpr int kMaxThreads = kBlocksPerSM * kThreads;
constexpr int kClusterSizes = 4;  // 2, 4, 8 and 16 blocks
constexpr int kMaxCluster = 1 << kClusterSizes;
constexpr int kMaxRowBytes = 256;
// A thread waits for the vectors that it keeps in kLoadStages stages; the others pass through kRingSlots slots.
constexpr int kLoadStages = 4;
constexpr int kRingSlots = 4;

// What of a device the geometry depends on.
struct DeviceLimits {
  int sms;
  int shared_per_block;  // bytes, by opt-in
  int shared_per_sm;
  int reserved_shared;  // of each block, by the system
  int max_cluster;      // blocks that can share a cluster; 1: no clusters
  // Clusters of 2 << i blocks that run at once, with one block an SM and with two, as the driver says: a cluster lies
  // within one GPC, whose number of SMs need not be a multiple of the cluster's size.
  int clusters_at_once[kBlocksPerSM][kClusterSizes];
  int max_grid;      // gridDim.x
  int l2_bytes;      // of the cache that all SMs share
  bool cooperative;  // whether the grid's blocks can be launched all at once
  // A choice, not a limit: the most bytes of a row that a channels_last tile takes where no group can keep a tile that
  // is one cache line wide.
  int max_row_bytes = kMaxRowBytes;
};

enum class Group : std::uint8_t { kBlock, kCluster, kGrid };  // how a group's blocks all-reduce their sums
enum class Tile : std::uint8_t { kChannel, kColumns };

// Offsets into a block's dynamic shared memory, bytes.
struct SharedLayout {
  int staging;  // [input][kept + ring][worker] vectors
  int slot;     // from one of a thread's slots to its next
  int region;   // from an input's slots to those of the next input
  int mask;     // [kept + ring][worker] words, which hold the byte of the thread's vector
  int merge;    // doubles, through which the block's threads merge their sums
  int columns;  // where each lane has a channel: coefficients (coefficients.cuh). They overlay `merge`: those of the
                // sums are read before the merge, those of the map are written after it.
  int own;      // double [2: parity][2][channels]: this block's sums, read by the others of its cluster
  int total;    // double [2][channels]: the group's sums
  int shift;    // double [kMaxReduceCoefficients][channels]; without an activation only the first, the shift
  int coefficients;  // double [kMaxCoefficients][channels]
  int needs_fp64;    // int [channels]
  int bytes;
};

// Passed to the kernels by value.
struct LaunchPlan {
  Tile tile;
  Group group;
  // the matrix
  std::int64_t rows;
  std::int64_t row_width;            // columns, and the distance between rows
  std::int64_t numel;                // the last row of a folded matrix ends here
  std::int64_t columns_per_channel;  // channel of column j: j / columns_per_channel % C
  std::int64_t C;
  // tiles
  std::int64_t tiles;
  std::int64_t tile_width;  // columns
  int tile_channels;        // the last tile may have fewer
  // a group's blocks and threads
  int groups;        // they take tiles in turn
  int group_blocks;  // gridDim.x = groups*group_blocks
  int threads_x;
  int threads_y;
  int workers;     // threads_x*threads_y
  int threads;     // blockDim.x: the workers, and idle threads up to a whole warp
  int merge_rows;  // rows of threads whose sums pass through the merge buffer at a time
  int parts;       // of a row, one a step: more than 1 if a row has more than threads_x vectors
  // A step moves a thread on by `step` parts of rows: whole rows and part_step parts. Its vector moves on by
  // vector_step elements, and by vector_wrap more where the part passes the end of a row.
  std::int64_t step;
  int part_step;
  std::int64_t vector_step;
  std::int64_t vector_wrap;
  int full_steps;             // taken by every worker
  std::int64_t partial_step;  // parts of rows left over: one more step for so many rows of threads
  bool whole;              // every vector of every thread lies in the tile, on a 16-byte boundary; 32 bits count them
  std::int64_t next_tile;  // vectors, if whole: from a vector to the same one of the group's next tile
  std::int64_t next_mask;  // likewise, in bytes of the mask
  bool reduces;            // there are sums
  int inputs;              // tensors that are read, except forward's residual, which only the map reads
  bool reads_mask;         // and the bytes of a mask for their vectors
  int kept;                // vectors of each input that a thread keeps in shared memory
  int ring;                // slots for all other vectors to pass through; 0 if there are none
  bool exceeds_l2;         // the results are too large for their next reader to find them in L2
  SharedLayout shared;
  // a mask (common/mask.h): the byte of a vector of row r, tile t is r*mask_row + t*mask_tile + its place in the tile
  std::int64_t mask_row;
  std::int64_t mask_tile;
  std::int64_t mask_step;  // as vector_step and vector_wrap, in bytes of the mask
  std::int64_t mask_wrap;
  int share;  // values that a block adds up for its group; 0: every block adds up all of them
  WorkspaceSize workspace_size;
  // where to take the samples of the first channel; those of channel c are c*sample_stride further on
  std::int64_t sample_offsets[kMaxSamples];
  int samples;
  std::int64_t sample_stride;
};

// What of a call the geometry depends on.
struct KernelTraits {
  int inputs;  // 1 to 3 tensors to read, forward's residual not counted
  bool reads_mask;
  bool reduces;  // there are sums to be known before the map
  bool activated;
};

LaunchPlan make_launch_plan(const Problem& problem, const KernelTraits& traits, const DeviceLimits& limits);

// The path that the plan takes through the kernel, in words: "cluster of 16, read once".
std::string description(const LaunchPlan& plan);

}  // namespace bnext::cuda
