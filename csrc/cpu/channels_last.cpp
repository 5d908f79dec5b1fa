// Channels last, and (N, C): a matrix of M = N*HW rows and C columns, a channel a column.
//
// Whole rows are read in order, twice: once to add up the columns, once to map them. The second pass walks the
// row chunks backwards, so that it starts with what the first has left in the caches.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../common/statistics.h"
#include "isa.h"
#include "traversal.h"

namespace bnext::cpu {
namespace {

constexpr std::int64_t kMinChunkRows = 64;      // keeps the chunks' sums small beside the chunks
constexpr std::int64_t kMinTasks = 16;          // columns are shared out too where there are fewer row chunks
constexpr std::int64_t kMinSlabColumns = 256;   // narrower column slabs read memory badly
constexpr std::int64_t kMinFoldedColumns = 64;  // what the leaves' unrolled loop takes
constexpr std::int64_t kMaxFoldedColumns = 2048;
constexpr std::int64_t kFinishColumns = 256;  // of one task between the passes

// How far ahead large inputs are asked for. A reduction's tiles of rows up to this length are read almost in order,
// which the processor foresees by itself.
constexpr std::int64_t kAheadBytes = 8192;
constexpr std::int64_t kMaxForeseenBytes = 256;

// How many rows to take as one: a multiple of 16 columns has no rest that would be done element by element.
// Column j of a folded row belongs to channel j % C.
std::int64_t fold_of(std::int64_t C, std::int64_t M) {
  std::int64_t fold = 16 / std::gcd(C, std::int64_t{16});
  while (fold * C < kMinFoldedColumns) fold *= 2;
  return fold * C <= kMaxFoldedColumns && fold <= M ? fold : 1;
}

class ChannelsLast {
 public:
  ChannelsLast(const Problem& problem, ChannelOp& op)
      : problem_(problem), op_(op), leaves_(current_leaves()), M_(problem.count()), fold_(fold_of(problem.C, M_)) {
    columns_ = problem.C * fold_;
    rows_ = M_ / fold_;
    rest_ = M_ % fold_ * problem.C;
    const std::int64_t wanted = kChunkElements / columns_;
    chunk_rows_ = wanted < divide_up(kMinChunkRows, fold_) ? divide_up(kMinChunkRows, fold_) : wanted;
    chunks_ = divide_up(rows_, chunk_rows_);
    slab_columns_ = columns_;
    if (chunks_ < kMinTasks && fold_ == 1) {
      const std::int64_t share = divide_up(columns_, divide_up(kMinTasks, chunks_));
      slab_columns_ = divide_up(share < kMinSlabColumns ? kMinSlabColumns : share, 64) * 64;
    }
    slabs_ = divide_up(columns_, slab_columns_);
    mask_row_ = divide_up(columns_, 8);
    ahead_ = op.streams ? kAheadBytes / element_size(problem.dtype) : 0;
  }

  void run(const Parallel& parallel) {
    const int count = map_coefficients_of(op_.map_op);
    std::vector<double> coefficients(static_cast<std::size_t>(columns_ * count));
    std::atomic<bool> single_fits{true};
    const auto finish = [&](std::int64_t c, const ChannelSums& sums) {
      double value[kMaxCoefficients] = {};
      op_.finish(c, sums, value);
      if (!fits_float32(value, count)) single_fits.store(false, std::memory_order_relaxed);
      for (int k = 0; k < count; ++k) {
        double* row = coefficients.data() + k * columns_;
        for (std::int64_t j = c; j < columns_; j += problem_.C) row[j] = value[k];
      }
    };
    if (op_.reduces) {
      reduce_all(parallel, finish);
    } else {
      for_each_task_of_channels(parallel, [&](std::int64_t c0, std::int64_t n) {
        for (std::int64_t c = c0; c < c0 + n; ++c) finish(c, ChannelSums{});
      });
    }
    if (!op_.maps()) return;
    if (single_fits && natural_compute(problem_.dtype) == Compute::kFloat32) {
      const std::vector<float> single(coefficients.begin(), coefficients.end());
      map_all(parallel, single.data(), Compute::kFloat32);
    } else {
      map_all(parallel, coefficients.data(), Compute::kFloat64);
    }
  }

 private:
  template <typename F>
  void for_each_task_of_channels(const Parallel& parallel, F&& f) const {
    parallel(divide_up(problem_.C, kFinishColumns), [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t c0 = task * kFinishColumns;
        f(c0, problem_.C - c0 < kFinishColumns ? problem_.C - c0 : kFinishColumns);
      }
    });
  }

  template <typename Finish>
  void reduce_all(const Parallel& parallel, Finish&& finish) {
    ReduceCoefficients start(problem_.C, std::max(1, reduce_coefficients_of(op_.reduce_op)));
    set_coefficients(start);
    const double* shift = start.row(0);
    const Partial partial = reduce_chunks(parallel, start, compute_of(start));
    std::vector<std::uint8_t> doubtful(static_cast<std::size_t>(problem_.C));
    std::atomic<bool> any_doubtful{false};
    for_each_merged(parallel, partial, shift, [&](std::int64_t c, const ChannelSums& sums) {
      if (op_.accurate(sums)) return finish(c, sums);
      doubtful[c] = 1;
      start.row(0)[c] = op_.better_shift(sums);
      any_doubtful.store(true, std::memory_order_relaxed);
    });
    if (!any_doubtful) return;
    // Rows are read whole, so every channel is reduced again; only the doubtful ones take the new sums, for a
    // channel's bits must not depend on another's values.
    const Partial again = reduce_chunks(parallel, start, Compute::kFloat64);
    for_each_merged(parallel, again, shift, [&](std::int64_t c, const ChannelSums& sums) {
      if (doubtful[c]) finish(c, sums);
    });
  }

  // double [count][C], the first the shift
  class ReduceCoefficients {
   public:
    ReduceCoefficients(std::int64_t C, int count) : count(count), C_(C), values_(static_cast<std::size_t>(C * count)) {}
    double* row(int k) { return values_.data() + k * C_; }
    const double* row(int k) const { return values_.data() + k * C_; }

    const int count;

   private:
    std::int64_t C_;
    std::vector<double> values_;
  };

  void set_coefficients(ReduceCoefficients& coefficients) const {
    const std::int64_t C = problem_.C;
    if (op_.samples) {
      const SamplePositions positions(M_);
      std::int64_t offsets[kMaxSamples];
      for (int i = 0; i < positions.samples; ++i) offsets[i] = positions.at[i] * C;
      leaves_.sample[static_cast<int>(problem_.dtype)]({op_.in[0], offsets, positions.samples, C, coefficients.row(0)});
      return;
    }
    for (std::int64_t c = 0; c < C; ++c) {
      double value[kMaxReduceCoefficients] = {};
      op_.reduce_coefficients(c, value);
      for (int k = 0; k < coefficients.count; ++k) coefficients.row(k)[c] = value[k];
    }
  }

  // Float32, unless it does not hold a channel's coefficients.
  Compute compute_of(const ReduceCoefficients& coefficients) const {
    if (coefficients.count == 1) return natural_compute(problem_.dtype);
    const bool fits = fits_float32(coefficients.row(0), static_cast<int>(problem_.C * coefficients.count));
    return fits ? natural_compute(problem_.dtype) : Compute::kFloat64;
  }

  // Each chunk's two sums of every column of the folded matrix: [chunk][first or second][column].
  using Partial = std::vector<double>;

  Partial reduce_chunks(const Parallel& parallel, const ReduceCoefficients& coefficients, Compute compute) const {
    // Those of each folded column, in both types.
    std::vector<double> wide(static_cast<std::size_t>(coefficients.count * columns_));
    for (int k = 0; k < coefficients.count; ++k) {
      for (std::int64_t j = 0; j < columns_; ++j) wide[k * columns_ + j] = coefficients.row(k)[j % problem_.C];
    }
    const std::vector<float> single(wide.begin(), wide.end());
    const auto leaf = leaves_.reduce_columns[static_cast<int>(problem_.dtype)][static_cast<int>(compute)]
                                            [static_cast<int>(op_.reduce_op)];
    Partial partial(static_cast<std::size_t>(2 * columns_ * (chunks_ + (rest_ != 0 ? 1 : 0))));
    const auto reduce = [&](std::int64_t chunk, std::int64_t column, std::int64_t rows, std::int64_t len) {
      ReduceArgs args;
      args.block = block_of(chunk, column, rows, len);
      args.epilogue = op_.epilogue;
      for (int k = 0; k < coefficients.count; ++k) {
        const std::int64_t at = k * columns_ + column;
        args.coefficients[k] =
            compute == Compute::kFloat64 ? static_cast<const void*>(wide.data() + at) : single.data() + at;
      }
      args.first = partial.data() + 2 * chunk * columns_ + column;
      args.second = args.first + columns_;
      args.in_order = op_.streams;
      args.ahead = columns_ * element_size(problem_.dtype) > kMaxForeseenBytes ? ahead_ : 0;
      leaf(args);
    };
    parallel(chunks_ * slabs_, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t column = task % slabs_ * slab_columns_;
        reduce(task / slabs_, column, rows_of(task / slabs_), width_of(column));
      }
    });
    if (rest_ != 0) reduce(chunks_, 0, 1, rest_);
    return partial;
  }

  // Calls f(c, sums) with each channel's sums over all chunks and all of its folded columns, added in a fixed order.
  template <typename F>
  void for_each_merged(const Parallel& parallel, const Partial& partial, const double* shift, F&& f) const {
    for_each_task_of_channels(parallel, [&](std::int64_t c0, std::int64_t n) {
      double first[kFinishColumns] = {};
      double second[kFinishColumns] = {};
      for (const double* chunk = partial.data(); chunk != partial.data() + partial.size(); chunk += 2 * columns_) {
        for (std::int64_t column = c0; column < columns_; column += problem_.C) {
          for (std::int64_t j = 0; j < n; ++j) {
            first[j] += chunk[column + j];
            second[j] += chunk[columns_ + column + j];
          }
        }
      }
      for (std::int64_t j = 0; j < n; ++j) f(c0 + j, ChannelSums{shift[c0 + j], first[j], second[j]});
    });
  }

  template <typename acc_t>
  void map_all(const Parallel& parallel, const acc_t* coefficients, Compute compute) const {
    const auto leaf =
        leaves_.map_columns[static_cast<int>(problem_.dtype)][static_cast<int>(compute)][static_cast<int>(op_.map_op)];
    const auto map = [&](std::int64_t chunk, std::int64_t column, std::int64_t rows, std::int64_t len) {
      MapArgs args;
      args.block = block_of(chunk, column, rows, len);
      op_.place(args, problem_.dtype, first_of(chunk) + column);
      args.ahead = ahead_;
      args.epilogue = op_.epilogue;
      const int count = map_coefficients_of(op_.map_op);
      for (int k = 0; k < count; ++k) args.coefficients[k] = coefficients + k * columns_ + column;
      leaf(args);
    };
    if (rest_ != 0) map(chunks_, 0, 1, rest_);
    parallel(chunks_ * slabs_, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = end - 1; task >= begin; --task) {
        const std::int64_t column = task % slabs_ * slab_columns_;
        map(task / slabs_, column, rows_of(task / slabs_), width_of(column));
      }
    });
  }

  std::int64_t rows_of(std::int64_t chunk) const {
    const std::int64_t left = rows_ - chunk * chunk_rows_;
    return left < chunk_rows_ ? left : chunk_rows_;
  }

  std::int64_t width_of(std::int64_t column) const {
    return columns_ - column < slab_columns_ ? columns_ - column : slab_columns_;
  }

  // The first row of a chunk. The rest, less than a folded row, counts as one chunk more.
  std::int64_t row_of(std::int64_t chunk) const { return chunk == chunks_ ? rows_ : chunk * chunk_rows_; }

  std::int64_t first_of(std::int64_t chunk) const { return row_of(chunk) * columns_; }

  Block block_of(std::int64_t chunk, std::int64_t column, std::int64_t rows, std::int64_t len) const {
    const std::int64_t row = row_of(chunk);
    return op_.block(problem_.dtype, first_of(chunk) + column, rows, len, columns_, row * mask_row_ + column / 8,
                     mask_row_);
  }

  const Problem& problem_;
  ChannelOp& op_;
  const LeafTable& leaves_;
  std::int64_t M_;
  std::int64_t fold_;     // rows of the tensor in one row of the matrix as the leaves see it
  std::int64_t columns_;  // C * fold_
  std::int64_t rows_;     // M_ / fold_
  std::int64_t rest_;     // elements in the M_ % fold_ rows of the tensor that are left over
  std::int64_t chunk_rows_;
  std::int64_t chunks_;
  std::int64_t slab_columns_;
  std::int64_t slabs_;
  std::int64_t ahead_;     // elements
  std::int64_t mask_row_;  // bytes of a folded row's mask; together no more than common/mask.h reserves
};

}  // namespace

void run_channels_last(const Problem& problem, ChannelOp& op, const Parallel& parallel) {
  ChannelsLast(problem, op).run(parallel);
}

}  // namespace bnext::cpu
