// Channels first: a channel is N planes of HW consecutive elements, C*HW apart.
//
// A group of channels that the second-level cache holds is reduced and then mapped while it is still there, so
// that main memory sees one read and one write. Where there are too few channels to keep the threads busy, each
// channel is cut into chunks, with a barrier between reducing and mapping. Where there is nothing to reduce, planes
// are mapped in runs of an image. Planes of a few elements are taken as columns (plane_columns.h).

#include <algorithm>
#include <vector>

#include "../common/mask.h"
#include "../common/statistics.h"
#include "isa/dispatch.h"
#include "plane_columns.h"
#include "traversal.h"
#include "valid.h"

namespace bnext::cpu {
namespace {

// A group has several channels, as the mathematics for each is done for eight at once, and more where there are many;
// but no more than the second-level cache holds, or the first-level cache where columns have coefficients and sums.
// Each thread has kTasksOfAThread groups if they are of kMinGroupChannels or more, and one at least.
constexpr std::int64_t kMinGroupChannels = 8;
constexpr std::int64_t kGroupChannels = 16;
constexpr std::int64_t kGroupBytes = 262144;
constexpr std::int64_t kGroupColumns = 512;
constexpr std::int64_t kMaxGroupRowBytes = 8192;
constexpr std::int64_t kTasksOfAThread = 4;

// In at most kFewImages images a channel is hardly more than a plane. Planes of at most kMaxPlaneOfFewImages elements
// are then mapped an image at a time, in memory order, by one kernel call for all channels of a group.
constexpr std::int64_t kFewImages = 2;
constexpr std::int64_t kMaxPlaneOfFewImages = 4096;

// Where nothing is reduced, a task maps about kTileBytes of an image, but at most kMaxTileChannels channels: a thread
// computes the coefficients of its own channels alone, and they stay in the first-level cache.
constexpr std::int64_t kTileBytes = 65536;
constexpr std::int64_t kMaxTileChannels = 512;

// A channel's planes lie apart, and the hardware prefetcher does not go from one to the next. So the kernels prefetch
// as many planes ahead as hold kPrefetchBytes: at least one, at most kMaxRowsPrefetched; but none beyond the last
// image, which would displace lines that are needed. Of fewer than kMinPrefetchedImages images it gains nothing.
constexpr std::int64_t kPrefetchBytes = 2048;
constexpr std::int64_t kMaxRowsPrefetched = 8;
constexpr std::int64_t kMinPrefetchedImages = 16;

// A store that misses the first-level cache waits, and the next stores with it. So the next cache line of an output is
// prefetched, unless it is stored past the caches; of long planes of many images, which are mapped one image after the
// other, the same place in the next image.
constexpr std::int64_t kMaxLinePrefetchedBytes = 1024;

class ChannelsFirst {
 public:
  ChannelsFirst(const Problem& problem, const ChannelOp& op)
      : problem_(problem),
        op_(op),
        kernels_(current_kernels()),
        plane_columns_(problem, op, kernels_),
        mask_row_(mask_row_bytes(problem.HW, kCpuMaskLanes)) {
    const std::int64_t HW = problem.HW;
    if (op.samples != nullptr) {
      for (int i = 0; i < op.samples->samples; ++i) {
        sample_offsets_[i] = op.samples->at[i] / HW * problem.C * HW + op.samples->at[i] % HW;
      }
    }
    valid_row_ = divide_up(HW, 8);
    if (op.valid != nullptr) {
      valid_bits_.resize(static_cast<std::size_t>(problem.N * valid_row_));
      for (std::int64_t n = 0; n < problem.N; ++n) {
        pack_valid(op.valid + n * HW, HW, valid_bits_.data() + n * valid_row_);
      }
    }
    if (HW <= kChunkElements) {
      rows_per_chunk_ = kChunkElements / HW;
      pieces_per_row_ = 1;
      piece_ = HW;
    } else {
      rows_per_chunk_ = 1;
      pieces_per_row_ = divide_up(HW, kChunkElements);
      piece_ = kChunkElements;
    }
    chunks_ = divide_up(problem.N, rows_per_chunk_) * pieces_per_row_;
    const std::int64_t plane_bytes = HW * element_size(problem.dtype);
    if (problem.N >= kMinPrefetchedImages) {
      images_ahead_ = std::clamp<std::int64_t>(kPrefetchBytes / plane_bytes, 1, kMaxRowsPrefetched);
      writes_ahead_ = plane_bytes > kMaxLinePrefetchedBytes || op.non_temporal;
    }
    line_ = op.non_temporal ? 0 : kLineBytes / element_size(problem.dtype);
  }

  void run(const Parallel& parallel) const {
    const std::int64_t C = problem_.C;
    const std::int64_t channel_bytes = problem_.count() * element_size(problem_.dtype) * op_.inputs();
    const bool in_columns = plane_columns_.take_map_alone();
    if (!op_.reduces && (in_columns || problem_.N * C >= kEnoughTasks)) {
      run_map_alone(parallel, in_columns);
    } else if (C >= kEnoughTasks || chunks_ == 1) {
      run_fused(parallel, group_of(channel_bytes, parallel.threads()));
    } else {
      run_split(parallel);
    }
  }

 private:
  void run_map_alone(const Parallel& parallel, bool in_columns) const {
    const std::int64_t C = problem_.C;
    const Tile tile = in_columns ? plane_columns_.tile(parallel.threads()) : tile_of_planes();
    const std::int64_t pieces = divide_up(problem_.N, tile.images);
    parallel(divide_up(C, tile.channels) * pieces, [&](std::int64_t begin, std::int64_t end) {
      const SumsTable none(tile.channels);
      Coefficients coefficients(map_coefficients_of(op_.map_op), tile.channels);
      PlaneColumns::Buffers columns(0);
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t c0 = task / pieces * tile.channels;
        const std::int64_t n = std::min(tile.channels, C - c0);
        const std::int64_t image = task % pieces * tile.images;
        if (task == begin || image == 0) finish(c0, n, none, coefficients, /*stores=*/image == 0);
        if (!op_.maps()) continue;
        if (in_columns) {
          plane_columns_.map(c0, n, image, std::min(tile.images, problem_.N - image), coefficients, 0, columns);
        } else {
          map_planes(image * C + c0, n, coefficients, 0);
        }
      }
    });
  }

  // Tiles of one image that are long enough to be read and written as fast as whole images, if there are enough tasks.
  Tile tile_of_planes() const {
    const std::int64_t plane_bytes = problem_.HW * element_size(problem_.dtype);
    const std::int64_t most = std::clamp<std::int64_t>(kTileBytes / plane_bytes, 1, kMaxTileChannels);
    const std::int64_t step = divide_up(kEnoughTasks, problem_.N);  // kEnoughTasks tasks, or a multiple
    const std::int64_t tiles = divide_up(divide_up(problem_.C, most), step) * step;
    return {divide_up(problem_.C, std::min(tiles, problem_.C)), 1};
  }

  // Maps consecutive planes of one image. The coefficients of their channels begin at index j.
  void map_planes(std::int64_t plane, std::int64_t planes, const Coefficients& coefficients, std::int64_t j) const {
    for (const std::int64_t end = plane + planes; plane < end;) {
      const std::int64_t rows = coefficients.alike(j, end - plane);
      const Compute compute = coefficients.compute(j);
      MapArgs args;
      args.block =
          op_.block(problem_.dtype, plane * problem_.HW, rows, problem_.HW, problem_.HW, plane * mask_row_, mask_row_);
      // All rows are of one image.
      if (op_.valid != nullptr) args.block.valid = valid_bits_.data() + plane / problem_.C * valid_row_;
      coefficients.pass(j, compute, args.coefficients);
      args.coefficient_step = 1;
      args.write_prefetch = line_;
      op_.map(kernels_.map_segments, problem_.dtype, compute, plane * problem_.HW, args);
      plane += rows;
      j += rows;
    }
  }

  // The sums, coefficients and flags of a group of channels.
  struct Group {
    Group(const ChannelOp& op, std::int64_t channels)
        : sums(channels),
          reduce(std::max(1, reduce_coefficients_of(op.reduce_op)), channels),
          map(map_coefficients_of(op.map_op), channels),
          needs_fp64(static_cast<std::size_t>(channels)) {}

    SumsTable sums;
    Coefficients reduce;
    Coefficients map;
    std::vector<std::uint8_t> needs_fp64;
  };

  // How many channels a group has.
  std::int64_t group_of(std::int64_t channel_bytes, std::int64_t threads) const {
    const bool in_columns = plane_columns_.take_reduction();
    std::int64_t channels = in_columns ? kGroupColumns / problem_.HW : kGroupChannels;
    channels = std::max(channels, problem_.C / kEnoughTasks);
    const std::int64_t plane_bytes = problem_.HW * element_size(problem_.dtype);
    if (in_columns) channels = std::min(channels, kMaxGroupRowBytes / plane_bytes);
    channels = std::max<std::int64_t>(1, std::min(channels, kGroupBytes / channel_bytes));
    if (threads == 1) return channels;
    // As many groups for one thread as for another.
    const std::int64_t fewest =
        std::clamp<std::int64_t>(problem_.C / (threads * kMinGroupChannels), 1, kTasksOfAThread);
    return divide_up(problem_.C, threads * std::max(fewest, divide_up(divide_up(problem_.C, channels), threads)));
  }

  void run_fused(const Parallel& parallel, std::int64_t group) const {
    const std::int64_t C = problem_.C;
    const bool reduces_columns = plane_columns_.take_reduction();
    const bool maps_columns = plane_columns_.take_map();
    parallel(divide_up(C, group), [&](std::int64_t begin, std::int64_t end) {
      Group of(op_, group);
      PlaneColumns::Buffers columns(reduces_columns ? group * problem_.HW : 0);
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t c0 = task * group;
        const std::int64_t n = C - c0 < group ? C - c0 : group;
        if (op_.reduces) {
          set_reduce_coefficients(c0, n, of);
          if (reduces_columns) {
            reduce_columns(c0, n, of, columns);
          } else {
            for (std::int64_t j = 0; j < n;) {
              const std::int64_t channels = of.reduce.alike(j, n - j);
              reduce_channels(c0 + j, j, channels, of, of.reduce.compute(j));
              j += channels;
            }
          }
          recompute_fp64(c0, n, of);
        }
        finish(c0, n, of.sums, of.map);
        if (!op_.maps()) continue;
        if (maps_columns) {
          plane_columns_.map(c0, n, 0, problem_.N, of.map, 0, columns);
          continue;
        }
        if (problem_.HW <= kMaxColumnPlane || (problem_.N <= kFewImages && problem_.HW <= kMaxPlaneOfFewImages)) {
          for (std::int64_t image = 0; image < problem_.N; ++image) map_planes(image * C + c0, n, of.map, 0);
          continue;
        }
        const std::int64_t next = op_.exceeds_l2 && task + 1 < end ? n * problem_.HW : 0;
        for (std::int64_t j = 0; j < n; ++j) {
          for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) map_chunk(c0 + j, chunk, of.map, j, next);
        }
      }
    });
  }

  void run_split(const Parallel& parallel) const {
    const std::int64_t C = problem_.C;
    Group of(op_, C);
    if (op_.reduces) {
      set_reduce_coefficients(0, C, of);
      std::vector<double> first(static_cast<std::size_t>(C * chunks_));
      std::vector<double> second(first.size());
      parallel(C * chunks_, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t task = begin; task < end; ++task) {
          const std::int64_t c = task / chunks_;
          reduce(c, 1, task % chunks_, of.reduce, c, of.reduce.compute(c), &first[task], &second[task]);
        }
      });
      for (std::int64_t task = 0; task < C * chunks_; ++task) {
        of.sums.first[task / chunks_] += first[task];
        of.sums.second[task / chunks_] += second[task];
      }
      recompute_fp64(0, C, of);
    }
    finish(0, C, of.sums, of.map);
    if (!op_.maps()) return;
    parallel(C * chunks_, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        map_chunk(task / chunks_, task % chunks_, of.map, task / chunks_, /*next=*/0);
      }
    });
  }

  void finish(std::int64_t c0, std::int64_t n, const SumsTable& sums, Coefficients& coefficients,
              bool stores = true) const {
    op_.finish(channels_of(c0, n, sums, coefficients, 0, stores));
    coefficients.narrow(kernels_, problem_.dtype, n);
  }

  void set_reduce_coefficients(std::int64_t c0, std::int64_t n, Group& of) const {
    double* const shift = of.reduce.wide.data();
    if (op_.samples != nullptr) {
      const void* const first = advance(op_.in[0], c0 * problem_.HW, problem_.dtype);
      kernels_.sample[static_cast<int>(problem_.dtype)](
          {first, sample_offsets_, op_.samples->samples, n, problem_.HW, shift});
    } else {
      op_.reduce_coefficients(channels_of(c0, n, of.sums, of.reduce, 0));
    }
    of.reduce.narrow(kernels_, problem_.dtype, n);
    std::copy_n(shift, n, of.sums.shift.begin());
  }

  // Computes the sums of n channels from c on. In the tables of the group they begin at index j.
  void reduce_channels(std::int64_t c, std::int64_t j, std::int64_t n, Group& of, Compute compute) const {
    double* const first = of.sums.first.data() + j;
    double* const second = of.sums.second.data() + j;
    std::fill_n(first, n, 0.0);
    std::fill_n(second, n, 0.0);
    for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) reduce(c, n, chunk, of.reduce, j, compute, first, second);
  }

  // A channel must not change another's bits, so one whose coefficients do not fit float32 is reduced by itself.
  void reduce_columns(std::int64_t c0, std::int64_t n, Group& of, PlaneColumns::Buffers& columns) const {
    plane_columns_.reduce(c0, n, of.reduce, columns, of.sums);
    for (std::int64_t j = 0; j < n; ++j) {
      const Compute compute = of.reduce.compute(j);
      if (compute != opmath_compute(problem_.dtype)) reduce_channels(c0 + j, j, 1, of, compute);
    }
  }

  void recompute_fp64(std::int64_t c0, std::int64_t n, Group& of) const {
    if (!op_.find_needs_fp64(channels_of(c0, n, of.sums, of.reduce, 0), of.needs_fp64.data())) return;
    for (std::int64_t j = 0; j < n; ++j) {
      if (of.needs_fp64[j] == 0) continue;
      of.sums.shift[j] = of.reduce.wide[j] = op_.refined_shift(of.sums.of(j));
      reduce_channels(c0 + j, j, 1, of, Compute::kFloat64);
    }
  }

  // A chunk's first image.
  std::int64_t image_of(std::int64_t chunk) const { return chunk / pieces_per_row_ * rows_per_chunk_; }

  // The rows of a block from `row` on.
  Block from_row(Block block, std::int64_t row) const {
    for (const void*& in : block.in) in = advance(in, row * block.stride, problem_.dtype);
    if (block.mask != nullptr) block.mask += row * block.mask_stride;
    if (block.valid != nullptr) block.valid += row * block.valid_stride;
    block.rows -= row;
    return block;
  }

  // The block of a chunk: pieces of planes of channel c, one image apart. Sets `offset` to that of its first element.
  Block block_of(std::int64_t c, std::int64_t chunk, std::int64_t& offset) const {
    const std::int64_t n = image_of(chunk);
    const std::int64_t s = chunk % pieces_per_row_ * piece_;
    const std::int64_t plane = n * problem_.C + c;
    const std::int64_t rows = problem_.N - n < rows_per_chunk_ ? problem_.N - n : rows_per_chunk_;
    const std::int64_t len = problem_.HW - s < piece_ ? problem_.HW - s : piece_;
    offset = plane * problem_.HW + s;
    Block block = op_.block(problem_.dtype, offset, rows, len, problem_.C * problem_.HW,
                            plane * mask_row_ + s / kCpuMaskLanes, problem_.C * mask_row_);
    if (op_.valid != nullptr) {
      block.valid = valid_bits_.data() + n * valid_row_ + s / 8;
      block.valid_stride = valid_row_;
    }
    return block;
  }

  // Adds up a chunk of each of n channels from c on. The channels' coefficients begin at index j.
  void reduce(std::int64_t c, std::int64_t n, std::int64_t chunk, const Coefficients& coefficients, std::int64_t j,
              Compute compute, double* first, double* second) const {
    std::int64_t offset;
    ReduceArgs args;
    args.block = block_of(c, chunk, offset);
    coefficients.pass(j, compute, args.coefficients);
    args.prefetch_distance = images_ahead_ * problem_.C * problem_.HW;
    args.prefetching_rows = problem_.N - images_ahead_ - image_of(chunk);
    args.first = first;
    args.second = second;
    args.channels = n;
    args.channel_stride = problem_.HW;
    args.mask_channel_stride = mask_row_;
    op_.reduce(kernels_.reduce_segments, problem_.dtype, compute, args);
  }

  // `next`: elements from channel c to its counterpart in the next group, which is prefetched; 0: no prefetch.
  void map_chunk(std::int64_t c, std::int64_t chunk, const Coefficients& coefficients, std::int64_t j,
                 std::int64_t next) const {
    std::int64_t offset;
    MapArgs args;
    args.block = block_of(c, chunk, offset);
    args.prefetch_distance = next;
    coefficients.pass(j, coefficients.compute(j), args.coefficients);
    const auto map = [&] { op_.map(kernels_.map_segments, problem_.dtype, coefficients.compute(j), offset, args); };
    if (writes_ahead_) {
      // The last image has no next one.
      const Block all = args.block;
      const bool ends = image_of(chunk) + all.rows == problem_.N;
      args.block.rows -= ends ? 1 : 0;
      args.write_prefetch = all.stride;
      map();
      if (!ends) return;
      args.block = from_row(all, all.rows - 1);
      offset += (all.rows - 1) * all.stride;
    }
    args.write_prefetch = line_;
    map();
  }

  const Problem& problem_;
  const ChannelOp& op_;
  const KernelTable& kernels_;
  PlaneColumns plane_columns_;
  std::int64_t sample_offsets_[kMaxSamples];  // of a channel's samples from its first element
  std::int64_t mask_row_;                     // bytes of a plane's mask
  std::int64_t valid_row_;
  std::vector<std::uint8_t> valid_bits_;  // (N, valid_row_): an image's positions, which its channels share
  std::int64_t rows_per_chunk_;
  std::int64_t pieces_per_row_;
  std::int64_t piece_;
  std::int64_t chunks_;
  std::int64_t images_ahead_ = 0;  // that the sums prefetch; 0: no prefetch
  bool writes_ahead_ = false;      // whether the map prefetches outputs of the next image instead of the next line
  std::int64_t line_;              // elements of a cache line; 0 where outputs are stored past the caches
};

}  // namespace

void run_channels_first(const Problem& problem, const ChannelOp& op, const Parallel& parallel) {
  ChannelsFirst(problem, op).run(parallel);
}

}  // namespace bnext::cpu
