// Channels last, and (N, C): a matrix of M = N*HW rows and C columns, a channel a column.
//
// Whole rows are read in order, twice: once to add up the columns, once to map them. The second pass takes the
// row chunks backwards, so that it starts with what the first has left in the caches. Where there are few rows, the
// work for each channel takes most of the time: one task then reduces, finishes and maps a block of columns. Where
// there is nothing to reduce, one pass is enough.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "../common/mask.h"
#include "../common/statistics.h"
#include "isa/dispatch.h"
#include "traversal.h"
#include "valid.h"

namespace bnext::cpu {
namespace {

constexpr std::int64_t kChunkRows = 64;     // about the least: keeps a chunk's sums small beside its elements
constexpr std::int64_t kColumnBlock = 256;  // about the least: prefetchers follow rows, narrow blocks are slow
constexpr std::int64_t kBlockAlignment = 32;
constexpr std::int64_t kMinFoldedColumns = 64;  // one step of the kernels' unrolled loop
constexpr std::int64_t kMaxFoldedColumns = 2048;
constexpr std::int64_t kFinishColumns = 256;  // channels of one task between the passes

// Where there are few rows, a block of columns has about kBlockElements, which are still in the caches when they are
// mapped, and at most kMaxBlockColumns, whose sums and coefficients stay in the first-level cache.
constexpr std::int64_t kBlockElements = 32768;
constexpr std::int64_t kMaxBlockColumns = 512;

// Beyond the second-level cache a reduction reads memory nearly in order: in tiles of about kTileBytes, though of at
// least kMinTileRows rows, which share a tile's fixed costs. Its input is prefetched, except for rows of at most
// kHardwarePrefetchedBytes, which the hardware prefetches by itself.
constexpr std::int64_t kTileBytes = 2048;
constexpr std::int64_t kMinTileRows = 4;
constexpr std::int64_t kPrefetchBytes = 8192;
constexpr std::int64_t kHardwarePrefetchedBytes = 256;

// How many rows of the tensor to fold into one: a row of a multiple of 16 columns has no tail.
// Column j of a folded row belongs to channel j % C. Long rows are folded only if there are many of them: few are
// divided among tasks by columns, too.
std::int64_t fold_of(std::int64_t C, std::int64_t M) {
  if (C >= kMinFoldedColumns && M < kEnoughTasks * kChunkRows) return 1;
  std::int64_t fold = 16 / std::gcd(C, std::int64_t{16});
  while (fold * C < kMinFoldedColumns) fold *= 2;
  return fold * C <= kMaxFoldedColumns && fold <= M ? fold : 1;
}

class ChannelsLast {
 public:
  ChannelsLast(const Problem& problem, const ChannelOp& op)
      : problem_(problem), op_(op), kernels_(current_kernels()), M_(problem.count()), fold_(fold_of(problem.C, M_)) {
    columns_ = problem.C * fold_;
    rows_ = M_ / fold_;
    remainder_ = M_ % fold_ * problem.C;
    const std::int64_t wanted = std::min(kChunkElements / columns_, divide_up(rows_, kEnoughTasks));
    const std::int64_t least = divide_up(kChunkRows, fold_);
    if (op.reduces) {
      chunk_rows_ = even_share(rows_, rows_ / std::max(wanted, least));
    } else {
      chunk_rows_ = rows_ < 2 * least ? rows_ : even_share(rows_, rows_ / std::max<std::int64_t>(1, wanted));
    }
    chunks_ = divide_up(rows_, chunk_rows_);
    column_block_ = columns_;
    // Columns are divided among tasks too, unless there are many rows and nothing has to be added up.
    if (fold_ == 1 && (op.reduces ? chunks_ < kEnoughTasks : chunks_ == 1)) {
      const std::int64_t blocks = std::min(divide_up(kEnoughTasks, chunks_), columns_ / kColumnBlock);
      column_block_ = block_width(op.reduces ? blocks : divide_up(columns_, kMaxBlockColumns));
    }
    column_blocks_ = divide_up(columns_, column_block_);
    mask_row_ = divide_up(columns_, kCpuMaskLanes);
    row_bytes_ = columns_ * element_size(problem.dtype);
    tile_rows_ = op.exceeds_l2 ? std::clamp(kTileBytes / row_bytes_, kMinTileRows, kMaxTileRows) : kMaxTileRows;
    prefetch_distance_ =
        op.exceeds_l2 ? std::max(kPrefetchBytes, tile_rows_ * row_bytes_) / element_size(problem.dtype) : 0;
    if (op.valid != nullptr && fold_ != 1) repeat_for_channels();
  }

  void run(const Parallel& parallel) const {
    if (!op_.reduces) return run_map_alone(parallel);
    if (chunks_ == 1 && fold_ == 1) return run_in_blocks(parallel);
    Coefficients coefficients(map_coefficients_of(op_.map_op), columns_);
    SumsTable sums(problem_.C);
    reduce_all(parallel, sums, coefficients);
    if (!op_.maps()) return;
    fold(coefficients);
    coefficients.narrow(kernels_, problem_.dtype, columns_);
    map_all(parallel, coefficients);
  }

 private:
  // A table with an entry of C bytes for each byte of eight pixels' valid bits: every bit repeated C times.
  void repeat_for_channels() {
    const std::int64_t C = problem_.C;
    repeated_.resize(static_cast<std::size_t>(256 * C));
    for (std::int64_t pixel = 0; pixel < 8; ++pixel) {
      std::uint8_t* const alone = repeated_.data() + (C << pixel);
      for (std::int64_t bit = pixel * C; bit < (pixel + 1) * C; ++bit) {
        alone[bit / 8] |= static_cast<std::uint8_t>(1 << bit % 8);
      }
      // The entries in which earlier pixels are valid too.
      for (std::int64_t i = C; i < C << pixel; ++i) alone[i] = repeated_[i] | alone[i % C];
    }
  }

  // A task is a chunk of whole rows or, where there are few rows, a block of columns.
  void run_map_alone(const Parallel& parallel) const {
    parallel(chunks_ * column_blocks_, [&](std::int64_t begin, std::int64_t end) {
      const SumsTable none(column_block_);
      Coefficients coefficients(map_coefficients_of(op_.map_op), column_block_);
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t column = task % column_blocks_ * column_block_;
        const std::int64_t chunk = task / column_blocks_;
        const std::int64_t n = width_of(column);
        if (task == begin || column_blocks_ != 1) {
          op_.finish(channels_of(column, fold_ == 1 ? n : problem_.C, none, coefficients, 0, /*stores=*/chunk == 0));
          fold(coefficients);
          coefficients.narrow(kernels_, problem_.dtype, n);
        }
        if (!op_.maps()) continue;
        const Compute compute = common_compute(coefficients, n);
        map(chunk, column, rows_of(chunk), n, coefficients, 0, compute);
        if (chunk == 0 && remainder_ != 0) map(chunks_, 0, 1, remainder_, coefficients, 0, compute);
      }
    });
  }

  void run_in_blocks(const Parallel& parallel) const {
    const std::int64_t C = problem_.C;
    const std::int64_t most = std::clamp(kBlockElements / M_, kColumnBlock, kMaxBlockColumns);
    const std::int64_t width = block_width(divide_up(C, most));
    parallel(divide_up(C, width), [&](std::int64_t begin, std::int64_t end) {
      Coefficients start(std::max(1, reduce_coefficients_of(op_.reduce_op)), width);
      Coefficients coefficients(map_coefficients_of(op_.map_op), width);
      SumsTable sums(width);
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t c = task * width;
        const std::int64_t n = std::min(width, C - c);
        reduce_block(c, n, start, sums);
        op_.finish(channels_of(c, n, sums, coefficients, 0));
        if (!op_.maps()) continue;
        coefficients.narrow(kernels_, problem_.dtype, n);
        map(0, c, rows_, n, coefficients, 0, common_compute(coefficients, n));
      }
    });
  }

  // Computes the sums of channels [c, c + n), which begin at index 0 of the tables.
  void reduce_block(std::int64_t c, std::int64_t n, Coefficients& start, SumsTable& sums) const {
    set_reduce_coefficients(c, n, sums, start);
    start.narrow(kernels_, problem_.dtype, n);
    reduce(0, c, rows_, n, start, 0, common_compute(start, n), sums.first.data(), sums.second.data());
    std::vector<std::uint8_t> needs_fp64(static_cast<std::size_t>(n));
    if (!op_.find_needs_fp64(channels_of(c, n, sums, start, 0), needs_fp64.data())) return;
    for (std::int64_t j = 0; j < n; ++j) {
      if (needs_fp64[j] != 0) sums.shift[j] = start.wide[j] = op_.refined_shift(sums.of(j));
    }
    SumsTable better(n);
    reduce(0, c, rows_, n, start, 0, Compute::kFloat64, better.first.data(), better.second.data());
    take_better(needs_fp64.data(), n, better, 0, sums);
  }

  // A channel's bits must not depend on another's values: only channels that need float64 take the new sums.
  static void take_better(const std::uint8_t* needs_fp64, std::int64_t n, const SumsTable& better, std::int64_t j0,
                          SumsTable& sums) {
    for (std::int64_t j = j0; j < j0 + n; ++j) {
      if (needs_fp64[j] == 0) continue;
      sums.first[j] = better.first[j];
      sums.second[j] = better.second[j];
    }
  }

  // Calls f(c, n) for channels [c, c + n), the ranges that one thread finishes at a time.
  template <typename F>
  void for_each_task(const Parallel& parallel, F&& f) const {
    parallel(divide_up(problem_.C, kFinishColumns), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t c = task * kFinishColumns;
        f(c, problem_.C - c < kFinishColumns ? problem_.C - c : kFinishColumns);
      }
    });
  }

  // The columns of each of about so many even blocks: whole cache lines of 16-bit elements.
  std::int64_t block_width(std::int64_t blocks) const {
    return divide_up(even_share(columns_, blocks), kBlockAlignment) * kBlockAlignment;
  }

  void finish(std::int64_t c, std::int64_t n, const SumsTable& sums, Coefficients& coefficients) const {
    op_.finish(channels_of(c, n, sums, coefficients, c));
  }

  // Repeats the coefficients of the channels for all folded columns.
  void fold(Coefficients& coefficients) const {
    for (int k = 0; k < coefficients.count; ++k) {
      double* const row = coefficients.wide.data() + k * columns_;
      for (std::int64_t j = problem_.C; j < columns_; j += problem_.C) std::copy_n(row, problem_.C, row + j);
    }
  }

  void reduce_all(const Parallel& parallel, SumsTable& sums, Coefficients& coefficients) const {
    Coefficients start(std::max(1, reduce_coefficients_of(op_.reduce_op)), columns_);
    set_reduce_coefficients(0, problem_.C, sums, start);
    fold(start);
    start.narrow(kernels_, problem_.dtype, columns_);
    std::vector<std::uint8_t> needs_fp64(static_cast<std::size_t>(problem_.C));
    std::vector<std::uint8_t> unfinished(static_cast<std::size_t>(divide_up(problem_.C, kFinishColumns)));
    const Partial partial = reduce_chunks(parallel, start, common_compute(start, columns_));
    for_each_task(parallel, [&](std::int64_t c, std::int64_t n) {
      merge(partial, c, n, sums.first.data(), sums.second.data());
      if (op_.find_needs_fp64(channels_of(c, n, sums, start, c), needs_fp64.data() + c)) {
        unfinished[c / kFinishColumns] = 1;
      } else {
        finish(c, n, sums, coefficients);
      }
    });
    if (std::find(unfinished.begin(), unfinished.end(), 1) == unfinished.end()) return;
    // Rows are read whole, so every channel is reduced again.
    for (std::int64_t c = 0; c < problem_.C; ++c) {
      if (needs_fp64[c] != 0) sums.shift[c] = start.wide[c] = op_.refined_shift(sums.of(c));
    }
    fold(start);
    const Partial again = reduce_chunks(parallel, start, Compute::kFloat64);
    SumsTable better(problem_.C);
    for_each_task(parallel, [&](std::int64_t c, std::int64_t n) {
      if (unfinished[c / kFinishColumns] == 0) return;
      merge(again, c, n, better.first.data(), better.second.data());
      take_better(needs_fp64.data(), n, better, c, sums);
      finish(c, n, sums, coefficients);
    });
  }

  // For channels [c, c + n), which begin at index 0 of the tables.
  void set_reduce_coefficients(std::int64_t c, std::int64_t n, SumsTable& sums, Coefficients& start) const {
    double* const shift = start.wide.data();
    if (op_.samples != nullptr) {
      const SamplePositions& positions = *op_.samples;
      std::int64_t offsets[kMaxSamples];
      for (int i = 0; i < positions.samples; ++i) offsets[i] = positions.at[i] * problem_.C;
      const void* const first = advance(op_.in[0], c, problem_.dtype);
      kernels_.sample[static_cast<int>(problem_.dtype)]({first, offsets, positions.samples, n, 1, shift});
    } else {
      op_.reduce_coefficients(channels_of(c, n, sums, start, 0));
    }
    std::copy_n(shift, n, sums.shift.begin());
  }

  // Rows are computed whole: in float64 if the coefficients of any of n columns do not fit float32.
  static Compute common_compute(const Coefficients& coefficients, std::int64_t n) {
    const auto end = coefficients.fits.begin() + n;
    const bool fit = std::find(coefficients.fits.begin(), end, 0) == end;
    return fit ? Compute::kFloat32 : Compute::kFloat64;
  }

  // Each chunk's two sums of every column of the folded matrix: [chunk][first or second][column]. Left uninitialised:
  // the thread that reduces a chunk is the first to write its sums, so that they lie in that thread's cache.
  struct Partial {
    explicit Partial(std::int64_t size) : data(new double[static_cast<std::size_t>(size)]), size(size) {}

    std::unique_ptr<double[]> data;
    std::int64_t size;
  };

  Partial reduce_chunks(const Parallel& parallel, const Coefficients& coefficients, Compute compute) const {
    Partial partial(2 * columns_ * (chunks_ + (remainder_ != 0 ? 1 : 0)));
    const auto reduce_into = [&](std::int64_t chunk, std::int64_t column, std::int64_t rows, std::int64_t len) {
      double* const first = partial.data.get() + 2 * chunk * columns_ + column;
      reduce(chunk, column, rows, len, coefficients, column, compute, first, first + columns_);
    };
    parallel(chunks_ * column_blocks_, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t column = task % column_blocks_ * column_block_;
        reduce_into(task / column_blocks_, column, rows_of(task / column_blocks_), width_of(column));
      }
    });
    if (remainder_ != 0) {
      double* const sums = partial.data.get() + 2 * chunks_ * columns_;
      std::fill_n(sums, 2 * columns_, 0.0);  // for the columns beyond the remainder
      reduce_into(chunks_, 0, 1, remainder_);
    }
    return partial;
  }

  // Computes the sums of `len` columns. Their coefficients begin at index j.
  void reduce(std::int64_t chunk, std::int64_t column, std::int64_t rows, std::int64_t len,
              const Coefficients& coefficients, std::int64_t j, Compute compute, double* first, double* second) const {
    ReduceArgs args;
    args.block = block_of(chunk, column, rows, len);
    const Padding padding(*this, chunk, args.block);
    coefficients.pass(j, compute, args.coefficients);
    args.first = first;
    args.second = second;
    std::fill_n(first, len, 0.0);
    std::fill_n(second, len, 0.0);
    if (padding.is_all) return;
    args.tile_rows = tile_rows_;
    args.prefetch_distance = row_bytes_ > kHardwarePrefetchedBytes ? prefetch_distance_ : 0;
    op_.reduce(kernels_.reduce_columns, problem_.dtype, compute, args);
  }

  // The sums of channels [c, c + n) over all chunks and all of their folded columns, added in a fixed order.
  void merge(const Partial& partial, std::int64_t c, std::int64_t n, double* first, double* second) const {
    std::fill_n(first + c, n, 0.0);
    std::fill_n(second + c, n, 0.0);
    const double* const end = partial.data.get() + partial.size;
    for (const double* chunk = partial.data.get(); chunk != end; chunk += 2 * columns_) {
      for (const double* at = chunk; at != chunk + columns_; at += problem_.C) {
        for (std::int64_t j = c; j < c + n; ++j) {
          first[j] += at[j];
          second[j] += at[columns_ + j];
        }
      }
    }
  }

  void map_all(const Parallel& parallel, const Coefficients& coefficients) const {
    const Compute compute = common_compute(coefficients, columns_);
    if (remainder_ != 0) map(chunks_, 0, 1, remainder_, coefficients, 0, compute);
    parallel(chunks_ * column_blocks_, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = end - 1; task >= begin; --task) {
        const std::int64_t column = task % column_blocks_ * column_block_;
        const std::int64_t rows = rows_of(task / column_blocks_);
        map(task / column_blocks_, column, rows, width_of(column), coefficients, column, compute);
      }
    });
  }

  // Maps `len` columns. Their coefficients begin at index j.
  void map(std::int64_t chunk, std::int64_t column, std::int64_t rows, std::int64_t len,
           const Coefficients& coefficients, std::int64_t j, Compute compute) const {
    MapArgs args;
    args.block = block_of(chunk, column, rows, len);
    const Padding padding(*this, chunk, args.block);
    args.prefetch_distance = op_.non_temporal ? prefetch_distance_ : 0;
    coefficients.pass(j, compute, args.coefficients);
    op_.map(kernels_.map_columns, problem_.dtype, compute, first_of(chunk) + column, args);
  }

  std::int64_t rows_of(std::int64_t chunk) const {
    const std::int64_t left = rows_ - chunk * chunk_rows_;
    return left < chunk_rows_ ? left : chunk_rows_;
  }

  std::int64_t width_of(std::int64_t column) const {
    return columns_ - column < column_block_ ? columns_ - column : column_block_;
  }

  // The first row of a chunk. The remainder, less than a folded row, counts as one chunk more.
  std::int64_t row_of(std::int64_t chunk) const { return chunk == chunks_ ? rows_ : chunk * chunk_rows_; }

  std::int64_t first_of(std::int64_t chunk) const { return row_of(chunk) * columns_; }

  Block block_of(std::int64_t chunk, std::int64_t column, std::int64_t rows, std::int64_t len) const {
    const std::int64_t row = row_of(chunk);
    return op_.block(problem_.dtype, first_of(chunk) + column, rows, len, columns_,
                     row * mask_row_ + column / kCpuMaskLanes, mask_row_);
  }

  // The valid bits of a block that lies in this chunk, one for each of its elements.
  struct Padding {
    Padding(const ChannelsLast& all, std::int64_t chunk, Block& block) {
      if (all.op_.valid == nullptr) return;
      const std::int64_t C = all.fold_ == 1 ? block.len : all.problem_.C;
      const std::uint8_t* const valid = all.op_.valid + all.row_of(chunk) * all.fold_;
      const std::int64_t pixels = block.rows * block.len / C;
      const std::int64_t count = count_valid(valid, pixels);
      is_all = count == 0;
      if (count == pixels) return;
      block.valid_stride = divide_up(block.len, 8);
      if (all.fold_ == 1) {
        bits.resize(static_cast<std::size_t>(block.rows * block.valid_stride));
        block.valid = bits.data();
        for (std::int64_t r = 0; r < pixels; ++r) {
          if (valid[r] != 0) std::fill_n(bits.data() + r * block.valid_stride, block.valid_stride, std::uint8_t{0xff});
        }
      } else {
        // Folded rows have whole bytes of bits, with no gaps between them. Eight pixels have C bytes.
        std::vector<std::uint8_t> of_pixels(static_cast<std::size_t>(divide_up(pixels, 8)));
        pack_valid(valid, pixels, of_pixels.data());
        bits.resize(of_pixels.size() * static_cast<std::size_t>(C));
        block.valid = bits.data();
        for (std::size_t i = 0; i < of_pixels.size(); ++i) {
          std::memcpy(bits.data() + i * C, all.repeated_.data() + of_pixels[i] * C, static_cast<std::size_t>(C));
        }
      }
    }

    bool is_all = false;
    std::vector<std::uint8_t> bits;
  };

  const Problem& problem_;
  const ChannelOp& op_;
  const KernelTable& kernels_;
  std::vector<std::uint8_t> repeated_;
  std::int64_t M_;
  std::int64_t fold_;       // rows of the tensor in one row of the matrix as the kernels see it
  std::int64_t columns_;    // C * fold_
  std::int64_t rows_;       // M_ / fold_
  std::int64_t remainder_;  // elements in the M_ % fold_ rows of the tensor that are left over
  std::int64_t chunk_rows_;
  std::int64_t chunks_;
  std::int64_t column_block_;
  std::int64_t column_blocks_;
  std::int64_t row_bytes_;
  std::int64_t tile_rows_;
  std::int64_t prefetch_distance_;  // elements
  std::int64_t mask_row_;           // bytes of a folded row's mask; together no more than common/mask.h reserves
};

}  // namespace

void run_channels_last(const Problem& problem, const ChannelOp& op, const Parallel& parallel) {
  ChannelsLast(problem, op).run(parallel);
}

}  // namespace bnext::cpu
