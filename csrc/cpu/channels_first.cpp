// Channels first: a channel is N planes of HW consecutive elements, C*HW apart.
//
// A group of channels that the second-level cache holds is reduced and then mapped while it is still there, so
// that main memory sees one read and one write. Where there are too few channels to keep the threads busy, each
// channel is cut into chunks, with a barrier between reducing and mapping. Where there is nothing to reduce, planes
// are mapped in memory order. Planes of a few elements are taken as columns.

#include <algorithm>
#include <vector>

#include "../common/mask.h"
#include "../common/statistics.h"
#include "isa/dispatch.h"
#include "traversal.h"
#include "valid.h"

namespace bnext::cpu {
namespace {

constexpr std::int64_t kGroupBytes = 262144;
constexpr std::int64_t kMinGroups = 16;  // fewer tasks cannot be shared out evenly

// Planes of at most kMaxColumnPlane elements are taken as columns, from kMinColumnRows images on. The moments' sums
// read one input and repeat only the shift for each column, so they take larger planes too, from more images on.
constexpr std::int64_t kMaxColumnPlane = 64;
constexpr std::int64_t kMinColumnRows = 8;
constexpr std::int64_t kMaxMomentsPlane = 256;
constexpr std::int64_t kMinMomentsRows = 32;

// Where there is nothing to reduce, planes of more than kMaxMappedPlaneBytes are mapped in memory order: few enough of
// their registers are tails. Smaller planes are mapped as columns, in rows of about kMappedRowBytes, as short rows lie
// too far apart. At least kMinMappedRows rows, if there are as many, share one copy of the repeated coefficients.
constexpr std::int64_t kMaxMappedPlaneBytes = 160;
constexpr std::int64_t kMappedRowBytes = 16384;
constexpr std::int64_t kMinMappedRows = 64;
constexpr std::int64_t kMinMappedTasks = 4;

// In at most kFewImages images a channel is hardly more than a plane. Planes of at most kMaxPlaneOfFewImages elements
// are then mapped an image at a time, in memory order, by one kernel call for all channels of a group.
constexpr std::int64_t kFewImages = 2;
constexpr std::int64_t kMaxPlaneOfFewImages = 4096;

// A channel's planes lie apart, and the hardware prefetcher does not go from one to the next. So the kernels prefetch
// as many planes ahead as hold kPrefetchBytes: at least one, at most kMaxRowsPrefetched.
constexpr std::int64_t kPrefetchBytes = 2048;
constexpr std::int64_t kMaxRowsPrefetched = 8;

// A store that misses the first-level cache waits, and the next stores with it. So the next cache line of an output is
// prefetched, unless it is stored past the caches; of long planes, which are mapped one image after the other, the same
// place in the next image.
constexpr std::int64_t kMaxLinePrefetchedBytes = 1024;

// The sum in eight chains, which do not wait for each other.
double sum_of(const double* values, std::int64_t n) {
  constexpr std::int64_t kChains = 8;
  double sums[kChains] = {};
  std::int64_t i = 0;
  for (; i + kChains <= n; i += kChains) {
    for (std::int64_t k = 0; k < kChains; ++k) sums[k] += values[i + k];
  }
  for (std::int64_t k = 0; i + k < n; ++k) sums[k] += values[i + k];
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

class ChannelsFirst {
 public:
  ChannelsFirst(const Problem& problem, const ChannelOp& op)
      : problem_(problem), op_(op), kernels_(current_kernels()), mask_row_(mask_row_bytes(problem.HW, kCpuMaskLanes)) {
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
    const std::int64_t rows = kPrefetchBytes / (HW * element_size(problem.dtype));
    prefetch_distance_ = (rows < 1 ? 1 : rows > kMaxRowsPrefetched ? kMaxRowsPrefetched : rows) * problem.C * HW;
    const bool short_planes = HW * element_size(problem.dtype) <= kMaxLinePrefetchedBytes;
    line_ = op.non_temporal ? 0 : kLineBytes / element_size(problem.dtype);
    write_prefetch_ = short_planes && line_ != 0 ? line_ : prefetch_distance_;
  }

  void run(const Parallel& parallel) const {
    const std::int64_t C = problem_.C;
    const std::int64_t channel_bytes = problem_.count() * element_size(problem_.dtype) * op_.inputs();
    const std::int64_t plane_bytes = problem_.HW * element_size(problem_.dtype);
    if (!op_.reduces && takes_columns() && op_.mask == nullptr && plane_bytes <= kMaxMappedPlaneBytes) {
      run_in_columns(parallel);
    } else if (!op_.reduces && problem_.N * C >= kMinGroups) {
      run_in_order(parallel);
    } else if (C >= kMinGroups || chunks_ == 1) {
      const std::int64_t fitting = kGroupBytes / channel_bytes;
      const std::int64_t most = C / kMinGroups;
      const std::int64_t group = fitting < most ? fitting : most;
      run_fused(parallel, group < 1 ? 1 : group);
    } else {
      run_split(parallel);
    }
  }

 private:
  void run_in_order(const Parallel& parallel) const {
    const std::int64_t C = problem_.C;
    Coefficients coefficients(map_coefficients_of(op_.map_op), C);
    finish(0, C, SumsTable(C), coefficients);
    if (!op_.maps()) return;
    const std::int64_t planes = problem_.N * C;
    const std::int64_t share = divide_up(kChunkElements, problem_.HW);  // planes of a task
    parallel(divide_up(planes, share), [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t last = end * share < planes ? end * share : planes;
      for (std::int64_t plane = begin * share; plane < last;) {
        // A kernel call ends with the image, where the channels begin again.
        const std::int64_t c = plane % C;
        const std::int64_t rows = C - c < last - plane ? C - c : last - plane;
        map_planes(plane, rows, coefficients, c);
        plane += rows;
      }
    });
  }

  // Maps planes as columns where nothing is reduced: as many channels at a time as fill a row of kMappedRowBytes.
  void run_in_columns(const Parallel& parallel) const {
    const std::int64_t C = problem_.C;
    Coefficients coefficients(map_coefficients_of(op_.map_op), C);
    finish(0, C, SumsTable(C), coefficients);
    if (!op_.maps()) return;
    const std::int64_t image_bytes = C * problem_.HW * element_size(problem_.dtype);
    // Each piece of rows spreads the coefficients over its columns anew.
    const std::int64_t pieces = std::max<std::int64_t>(1, problem_.N / kMinMappedRows);
    const std::int64_t fewest = divide_up(kMinMappedTasks, pieces);
    const std::int64_t group = divide_up(C, std::max(fewest, image_bytes / kMappedRowBytes));
    const std::int64_t groups = divide_up(C, group);
    const std::int64_t rows = divide_up(problem_.N, pieces);
    parallel(groups * divide_up(problem_.N, rows), [&](std::int64_t begin, std::int64_t end) {
      Columns columns(0);
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t c0 = task % groups * group;
        const std::int64_t n0 = task / groups * rows;
        map_columns(c0, std::min(group, C - c0), n0, std::min(rows, problem_.N - n0), coefficients, c0, columns);
      }
    });
  }

  // Maps consecutive planes of one image. The coefficients of their channels begin at index j.
  void map_planes(std::int64_t plane, std::int64_t planes, const Coefficients& coefficients, std::int64_t j) const {
    for (const std::int64_t end = plane + planes; plane < end;) {
      const std::int64_t rows = alike(coefficients, j, end - plane);
      const Compute compute = coefficients.compute(j);
      MapArgs args;
      args.block =
          op_.block(problem_.dtype, plane * problem_.HW, rows, problem_.HW, problem_.HW, plane * mask_row_, mask_row_);
      // All rows are of one image.
      if (op_.valid != nullptr) args.block.valid = valid_bits_.data() + plane / problem_.C * valid_row_;
      coefficients.pass(j, compute, args.coefficients);
      args.coefficient_step = 1;
      args.write_prefetch = line_;
      run_map(kernels_.map_segments, args, plane * problem_.HW, compute);
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

  void run_fused(const Parallel& parallel, std::int64_t group) const {
    const std::int64_t C = problem_.C;
    const bool small = takes_columns();
    // A mask's rows are planes, so that kernels for columns can neither read nor write it.
    const bool moments = op_.reduce_op == ReduceOp::kMomentSums;
    const bool reduces_columns =
        moments ? small || takes_columns(kMaxMomentsPlane, kMinMomentsRows) : small && !op_.epilogue.has_mask;
    const bool maps_columns = small && op_.mask == nullptr;
    parallel(divide_up(C, group), [&](std::int64_t begin, std::int64_t end) {
      Group of(op_, group);
      Columns columns(reduces_columns ? group * problem_.HW : 0);
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t c0 = task * group;
        const std::int64_t n = C - c0 < group ? C - c0 : group;
        if (op_.reduces) {
          set_reduce_coefficients(c0, n, of);
          if (reduces_columns) {
            reduce_columns(c0, n, of, columns);
          } else {
            for (std::int64_t j = 0; j < n;) {
              const std::int64_t channels = alike(of.reduce, j, n - j);
              reduce_channels(c0 + j, j, channels, of, of.reduce.compute(j));
              j += channels;
            }
          }
          recompute_fp64(c0, n, of);
        }
        finish(c0, n, of.sums, of.map);
        if (!op_.maps()) continue;
        if (maps_columns) {
          map_columns(c0, n, 0, problem_.N, of.map, 0, columns);
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

  void finish(std::int64_t c0, std::int64_t n, const SumsTable& sums, Coefficients& coefficients) const {
    op_.finish(channels_of(c0, n, sums, coefficients, 0));
    coefficients.narrow(kernels_, problem_.dtype, n);
  }

  // How many of n channels from j on are computed in the same type as the first.
  static std::int64_t alike(const Coefficients& coefficients, std::int64_t j, std::int64_t n) {
    std::int64_t count = 1;
    while (count < n && coefficients.compute(j + count) == coefficients.compute(j)) ++count;
    return count;
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

  void recompute_fp64(std::int64_t c0, std::int64_t n, Group& of) const {
    if (!op_.find_needs_fp64(channels_of(c0, n, of.sums, of.reduce, 0), of.needs_fp64.data())) return;
    for (std::int64_t j = 0; j < n; ++j) {
      if (of.needs_fp64[j] == 0) continue;
      of.sums.shift[j] = of.reduce.wide[j] = op_.refined_shift(of.sums.of(j));
      reduce_channels(c0 + j, j, 1, of, Compute::kFloat64);
    }
  }

  // Planes of a few elements would each end in a tail. A group of n channels is also a matrix of N rows and n*HW
  // columns, each of which belongs to one channel. (An image's valid bits would have to be repeated for each channel.)
  bool takes_columns(std::int64_t max_plane = kMaxColumnPlane, std::int64_t min_rows = kMinColumnRows) const {
    return problem_.HW <= max_plane && problem_.N >= min_rows && op_.valid == nullptr;
  }

  // Buffers for the columns of a group.
  struct Columns {
    explicit Columns(std::int64_t columns) : sums(static_cast<std::size_t>(2 * columns)) {}

    std::vector<double> sums;
    // Coefficients in float64 and in float32; mostly only one of the two is ever filled.
    std::vector<double> wide;
    std::vector<float> single;
  };

  // The columns of n channels in `rows` images, as a block whose first element is at `offset`.
  Block columns_of(std::int64_t offset, std::int64_t n, std::int64_t rows) const {
    return op_.block(problem_.dtype, offset, rows, n * problem_.HW, problem_.C * problem_.HW, 0, 0);
  }

  // Repeats the coefficients of n channels from j on for each of their columns: [coefficient][column].
  template <int kMax>
  void spread(const Coefficients& of, std::int64_t j, std::int64_t n, Compute compute, Columns& to,
              const void* (&coefficients)[kMax]) const {
    const auto repeat = [&](const auto& from, auto& columns) {
      const auto needed = static_cast<std::size_t>(of.count * n * problem_.HW);
      if (columns.size() < needed) columns.resize(needed);
      for (int k = 0; k < of.count; ++k) {
        auto* const row = columns.data() + k * n * problem_.HW;
        for (std::int64_t i = 0; i < n; ++i) {
          std::fill_n(row + i * problem_.HW, problem_.HW, from[k * of.channels + j + i]);
        }
        coefficients[k] = row;
      }
    };
    compute == Compute::kFloat32 ? repeat(of.single, to.single) : repeat(of.wide, to.wide);
  }

  void reduce_columns(std::int64_t c0, std::int64_t n, Group& of, Columns& columns) const {
    const Compute natural = opmath_compute(problem_.dtype);
    std::fill(columns.sums.begin(), columns.sums.end(), 0.0);
    ReduceArgs args;
    args.block = columns_of(c0 * problem_.HW, n, problem_.N);
    spread(of.reduce, 0, n, natural, columns, args.coefficients);
    args.epilogue = op_.epilogue;
    args.first = columns.sums.data();
    args.second = args.first + n * problem_.HW;
    kernels_.reduce_columns[static_cast<int>(problem_.dtype)][static_cast<int>(natural)]
                           [static_cast<int>(op_.reduce_op)](args);
    for (std::int64_t j = 0; j < n; ++j) {
      // A channel must not change another's bits, so one whose coefficients do not fit float32 is reduced alone.
      if (of.reduce.compute(j) != natural) {
        reduce_channels(c0 + j, j, 1, of, of.reduce.compute(j));
        continue;
      }
      of.sums.first[j] = sum_of(args.first + j * problem_.HW, problem_.HW);
      of.sums.second[j] = sum_of(args.second + j * problem_.HW, problem_.HW);
    }
  }

  // Maps n channels from c0 on in `rows` images from n0 on. The channels' coefficients begin at index j.
  void map_columns(std::int64_t c0, std::int64_t n, std::int64_t n0, std::int64_t rows, const Coefficients& of,
                   std::int64_t j, Columns& columns) const {
    for (std::int64_t done = 0; done < n;) {
      const std::int64_t count = alike(of, j + done, n - done);
      const Compute compute = of.compute(j + done);
      const std::int64_t offset = (n0 * problem_.C + c0 + done) * problem_.HW;
      MapArgs args;
      args.block = columns_of(offset, count, rows);
      spread(of, j + done, count, compute, columns, args.coefficients);
      run_map(kernels_.map_columns, args, offset, compute);
      done += count;
    }
  }

  // The block of a chunk: pieces of planes of channel c, one image apart. Sets `offset` to that of its first element.
  Block block_of(std::int64_t c, std::int64_t chunk, std::int64_t& offset) const {
    const std::int64_t n = chunk / pieces_per_row_ * rows_per_chunk_;
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
    args.epilogue = op_.epilogue;
    args.prefetch_distance = prefetch_distance_;
    args.first = first;
    args.second = second;
    args.channels = n;
    args.channel_stride = problem_.HW;
    args.mask_channel_stride = mask_row_;
    kernels_.reduce_segments[static_cast<int>(problem_.dtype)][static_cast<int>(compute)]
                            [static_cast<int>(op_.reduce_op)](args);
  }

  // `next`: elements from channel c to its counterpart in the next group, which is prefetched; 0: no prefetch.
  void map_chunk(std::int64_t c, std::int64_t chunk, const Coefficients& coefficients, std::int64_t j,
                 std::int64_t next) const {
    std::int64_t offset;
    MapArgs args;
    args.block = block_of(c, chunk, offset);
    args.prefetch_distance = next;
    args.write_prefetch = write_prefetch_;
    coefficients.pass(j, coefficients.compute(j), args.coefficients);
    run_map(kernels_.map_segments, args, offset, coefficients.compute(j));
  }

  // Adds the outputs of the block, whose first element is at `offset`, and the epilogue to `args`; runs the kernel.
  template <typename Kernels>
  void run_map(const Kernels& kernels, MapArgs& args, std::int64_t offset, Compute compute) const {
    op_.place(args, problem_.dtype, offset);
    args.epilogue = op_.epilogue;
    kernels[static_cast<int>(problem_.dtype)][static_cast<int>(compute)][static_cast<int>(op_.map_op)](args);
  }

  const Problem& problem_;
  const ChannelOp& op_;
  const KernelTable& kernels_;
  std::int64_t sample_offsets_[kMaxSamples];  // of a channel's samples from its first element
  std::int64_t mask_row_;                     // bytes of a plane's mask
  std::int64_t valid_row_;
  std::vector<std::uint8_t> valid_bits_;  // (N, valid_row_): an image's positions, which its channels share
  std::int64_t rows_per_chunk_;
  std::int64_t pieces_per_row_;
  std::int64_t piece_;
  std::int64_t chunks_;
  std::int64_t prefetch_distance_;  // elements, whole images
  std::int64_t line_;               // elements of a cache line; 0 where outputs are stored past the caches
  std::int64_t write_prefetch_;     // of planes that are mapped one image after the other
};

}  // namespace

void run_channels_first(const Problem& problem, const ChannelOp& op, const Parallel& parallel) {
  ChannelsFirst(problem, op).run(parallel);
}

}  // namespace bnext::cpu
