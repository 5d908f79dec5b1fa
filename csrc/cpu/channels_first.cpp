// Channels first: a channel is N planes of HW consecutive elements, C*HW apart.
//
// A group of channels that the second-level cache holds is reduced and then mapped while it is still there, so
// that main memory sees one read and one write. Where there are too few channels to keep the threads busy, the
// same work is cut into chunks of channels, with a barrier between reducing and mapping. Where there is nothing to
// reduce, planes are mapped in the order in which they lie. Planes of a few elements are taken as columns.

#include <algorithm>
#include <vector>

#include "../common/mask.h"
#include "../common/statistics.h"
#include "isa.h"
#include "traversal.h"

namespace bnext::cpu {
namespace {

constexpr std::int64_t kGroupBytes = 262144;
constexpr std::int64_t kMinGroups = 16;  // fewer tasks cannot be shared out evenly

// Planes up to this size are taken as columns, if there are enough of them one below the other.
constexpr std::int64_t kMaxColumnPlane = 64;
constexpr std::int64_t kMinColumnRows = 8;

// A channel's planes lie apart, and the processor does not foresee the jump from one to the next: so much of them is
// asked for ahead of its use.
constexpr std::int64_t kAheadBytes = 2048;
constexpr std::int64_t kMaxRowsAhead = 8;

class ChannelsFirst {
 public:
  ChannelsFirst(const Problem& problem, ChannelOp& op)
      : problem_(problem),
        op_(op),
        leaves_(current_leaves()),
        sample_positions_(problem.count()),
        mask_row_(mask_row_bytes(problem.HW, 8)) {
    const std::int64_t HW = problem.HW;
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
    const std::int64_t rows = kAheadBytes / (HW * element_size(problem.dtype));
    ahead_ = (rows < 1 ? 1 : rows > kMaxRowsAhead ? kMaxRowsAhead : rows) * problem.C * HW;
  }

  void run(const Parallel& parallel) {
    const std::int64_t C = problem_.C;
    const std::int64_t channel_bytes = problem_.count() * element_size(problem_.dtype) * op_.inputs();
    if (!op_.reduces && problem_.N * C >= kMinGroups && !takes_columns()) {
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
  using ReduceCoefficients = Coefficients<kMaxReduceCoefficients>;
  using MapCoefficients = Coefficients<kMaxCoefficients>;

  void finish(std::int64_t c, const ChannelSums& sums, MapCoefficients& coefficients) const {
    op_.finish(c, sums, coefficients.value);
    coefficients.settle(problem_.dtype);
  }

  void run_in_order(const Parallel& parallel) const {
    const std::int64_t C = problem_.C;
    // [coefficient][channel] in both types, so that one call of a leaf maps planes of many channels.
    std::vector<double> wide(static_cast<std::size_t>(kMaxCoefficients * C));
    std::vector<float> single(wide.size());
    std::vector<Compute> compute(static_cast<std::size_t>(C));
    for (std::int64_t c = 0; c < C; ++c) {
      MapCoefficients coefficients;
      finish(c, ChannelSums{}, coefficients);
      compute[c] = coefficients.compute;
      for (int k = 0; k < kMaxCoefficients; ++k) {
        wide[k * C + c] = coefficients.value[k];
        single[k * C + c] = coefficients.single[k];
      }
    }
    if (!op_.maps()) return;
    const std::int64_t planes = problem_.N * C;
    const std::int64_t share = divide_up(kChunkElements, problem_.HW);  // planes of a task
    parallel(divide_up(planes, share), [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t last = end * share < planes ? end * share : planes;
      for (std::int64_t plane = begin * share; plane < last;) {
        // Up to the end of the image, or to a channel that is computed in the other type.
        const std::int64_t c = plane % C;
        const std::int64_t most = C - c < last - plane ? C - c : last - plane;
        std::int64_t rows = 1;
        while (rows < most && compute[c + rows] == compute[c]) ++rows;
        MapArgs args;
        args.block = op_.block(problem_.dtype, plane * problem_.HW, rows, problem_.HW, problem_.HW, plane * mask_row_,
                               mask_row_);
        for (int k = 0; k < kMaxCoefficients; ++k) {
          const std::int64_t at = k * C + c;
          args.coefficients[k] =
              compute[c] == Compute::kFloat64 ? static_cast<const void*>(wide.data() + at) : single.data() + at;
        }
        args.coefficient_step = 1;
        map(args, plane * problem_.HW, compute[c]);
        plane += rows;
      }
    });
  }

  void run_fused(const Parallel& parallel, std::int64_t group) {
    const std::int64_t C = problem_.C;
    const bool as_columns = takes_columns();
    parallel(divide_up(C, group), [&](std::int64_t begin, std::int64_t end) {
      Group of(group, as_columns ? group * problem_.HW : 0);
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t c0 = task * group;
        const std::int64_t n = C - c0 < group ? C - c0 : group;
        if (!op_.reduces) {
          for (std::int64_t j = 0; j < n; ++j) of.sums[j] = ChannelSums{};
        } else if (as_columns) {
          reduce_columns(c0, n, of);
        } else {
          for (std::int64_t j = 0; j < n; ++j) of.sums[j] = reduce_channel(c0 + j);
        }
        for (std::int64_t j = 0; j < n; ++j) finish(c0 + j, of.sums[j], of.map[j]);
        if (!op_.maps()) continue;
        if (as_columns) {
          map_columns(c0, n, of);
          continue;
        }
        const std::int64_t ahead = task + 1 < end ? n * problem_.HW : 0;
        for (std::int64_t j = 0; j < n; ++j) {
          for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) map_chunk(c0 + j, chunk, of.map[j], ahead);
        }
      }
    });
  }

  // What is known of a group of channels, and room for its columns.
  struct Group {
    Group(std::int64_t channels, std::int64_t columns)
        : sums(static_cast<std::size_t>(channels)),
          reduce(sums.size()),
          map(sums.size()),
          column_sums(static_cast<std::size_t>(2 * columns)),
          wide(static_cast<std::size_t>(kMaxCoefficients * columns)),
          single(wide.size()) {}

    std::vector<ChannelSums> sums;
    std::vector<ReduceCoefficients> reduce;
    std::vector<MapCoefficients> map;
    std::vector<double> column_sums;
    std::vector<double> wide;
    std::vector<float> single;
  };

  // Planes of a few elements would each end in a part of a register. A group of channels is also a matrix of N rows,
  // whose n*HW columns each belong to one channel; a mask, whose rows are planes, is not.
  bool takes_columns() const {
    return problem_.HW <= kMaxColumnPlane && problem_.N >= kMinColumnRows && op_.mask == nullptr;
  }

  Block columns_of(std::int64_t c0, std::int64_t n) const {
    const std::int64_t HW = problem_.HW;
    return op_.block(problem_.dtype, c0 * HW, problem_.N, n * HW, problem_.C * HW, 0, 0);
  }

  // Repeats the coefficients of n channels for each of their columns: [coefficient][column].
  template <int kMax>
  void spread(const Coefficients<kMax>* of, std::int64_t n, Compute compute, Group& to,
              const void* (&coefficients)[kMax]) const {
    const std::int64_t HW = problem_.HW;
    for (int k = 0; k < kMax; ++k) {
      for (std::int64_t j = 0; j < n; ++j) {
        const std::int64_t first = (k * n + j) * HW;
        if (compute == Compute::kFloat32) {
          std::fill_n(to.single.begin() + first, HW, of[j].single[k]);
        } else {
          std::fill_n(to.wide.begin() + first, HW, of[j].value[k]);
        }
      }
      coefficients[k] = compute == Compute::kFloat32 ? static_cast<const void*>(to.single.data() + k * n * HW)
                                                     : to.wide.data() + k * n * HW;
    }
  }

  void reduce_columns(std::int64_t c0, std::int64_t n, Group& of) const {
    const std::int64_t columns = n * problem_.HW;
    const Compute natural = natural_compute(problem_.dtype);
    for (std::int64_t j = 0; j < n; ++j) of.reduce[j] = reduce_coefficients(c0 + j);
    std::fill(of.column_sums.begin(), of.column_sums.end(), 0.0);
    ReduceArgs args;
    args.block = columns_of(c0, n);
    spread(of.reduce.data(), n, natural, of, args.coefficients);
    args.epilogue = op_.epilogue;
    args.first = of.column_sums.data();
    args.second = args.first + columns;
    leaves_.reduce_columns[static_cast<int>(problem_.dtype)][static_cast<int>(natural)]
                          [static_cast<int>(op_.reduce_op)](args);
    for (std::int64_t j = 0; j < n; ++j) {
      ChannelSums& sums = of.sums[j];
      sums = {of.reduce[j].value[0], 0.0, 0.0};
      for (std::int64_t column = j * problem_.HW; column < (j + 1) * problem_.HW; ++column) {
        sums.first += args.first[column];
        sums.second += args.second[column];
      }
      // One of a group must not change another's bits, so what needs float64 is done by itself.
      if (of.reduce[j].compute != natural) {
        sums = reduce_channel(c0 + j);
      } else if (!op_.accurate(sums)) {
        sums = reduce_again(c0 + j, sums, of.reduce[j]);
      }
    }
  }

  void map_columns(std::int64_t c0, std::int64_t n, Group& of) const {
    for (std::int64_t j = 0; j < n;) {
      const Compute compute = of.map[j].compute;
      std::int64_t alike = 1;
      while (j + alike < n && of.map[j + alike].compute == compute) ++alike;
      MapArgs args;
      args.block = columns_of(c0 + j, alike);
      spread(of.map.data() + j, alike, compute, of, args.coefficients);
      args.epilogue = op_.epilogue;
      op_.place(args, problem_.dtype, (c0 + j) * problem_.HW);
      leaves_.map_columns[static_cast<int>(problem_.dtype)][static_cast<int>(compute)][static_cast<int>(op_.map_op)](
          args);
      j += alike;
    }
  }

  void run_split(const Parallel& parallel) {
    const std::int64_t C = problem_.C;
    std::vector<ChannelSums> sums(static_cast<std::size_t>(C));
    if (op_.reduces) {
      std::vector<ChannelSums> partial(static_cast<std::size_t>(C * chunks_));
      std::vector<ReduceCoefficients> start(static_cast<std::size_t>(C));
      for (std::int64_t c = 0; c < C; ++c) start[c] = reduce_coefficients(c);
      parallel(C * chunks_, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t task = begin; task < end; ++task) {
          reduce(task / chunks_, task % chunks_, start[task / chunks_], partial[task]);
        }
      });
      for (std::int64_t c = 0; c < C; ++c) {
        sums[c].shift = start[c].value[0];
        for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) {
          sums[c].first += partial[c * chunks_ + chunk].first;
          sums[c].second += partial[c * chunks_ + chunk].second;
        }
        if (!op_.accurate(sums[c])) sums[c] = reduce_again(c, sums[c], start[c]);
      }
    }
    std::vector<MapCoefficients> coefficients(static_cast<std::size_t>(C));
    for (std::int64_t c = 0; c < C; ++c) finish(c, sums[c], coefficients[c]);
    if (!op_.maps()) return;
    parallel(C * chunks_, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task) {
        map_chunk(task / chunks_, task % chunks_, coefficients[task / chunks_], /*ahead=*/0);
      }
    });
  }

  ReduceCoefficients reduce_coefficients(std::int64_t c) const {
    ReduceCoefficients coefficients;
    if (op_.samples) {
      coefficients.value[0] = sampled_shift(c);
    } else {
      op_.reduce_coefficients(c, coefficients.value);
    }
    coefficients.settle(problem_.dtype);
    return coefficients;
  }

  double sampled_shift(std::int64_t c) const {
    std::int64_t offsets[kMaxSamples];
    for (int i = 0; i < sample_positions_.samples; ++i) {
      const std::int64_t n = sample_positions_.at[i] / problem_.HW;
      const std::int64_t s = sample_positions_.at[i] % problem_.HW;
      offsets[i] = n * problem_.C * problem_.HW + s;
    }
    double shift = 0.0;
    leaves_.sample[static_cast<int>(problem_.dtype)](
        {advance(op_.in[0], c * problem_.HW, problem_.dtype), offsets, sample_positions_.samples, 1, &shift});
    return shift;
  }

  ChannelSums reduce_channel(std::int64_t c) const {
    const ReduceCoefficients coefficients = reduce_coefficients(c);
    ChannelSums sums;
    sums.shift = coefficients.value[0];
    for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) reduce(c, chunk, coefficients, sums);
    return op_.accurate(sums) ? sums : reduce_again(c, sums, coefficients);
  }

  ChannelSums reduce_again(std::int64_t c, const ChannelSums& doubtful, ReduceCoefficients coefficients) const {
    ChannelSums sums;
    sums.shift = coefficients.value[0] = op_.better_shift(doubtful);
    coefficients.compute = Compute::kFloat64;
    for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) reduce(c, chunk, coefficients, sums);
    return sums;
  }

  // Pieces of a channel's planes, one image apart. `first`: the offset of the block's first element.
  Block block_of(std::int64_t c, std::int64_t chunk, std::int64_t& first) const {
    const std::int64_t n = chunk / pieces_per_row_ * rows_per_chunk_;
    const std::int64_t s = chunk % pieces_per_row_ * piece_;
    const std::int64_t plane = n * problem_.C + c;
    const std::int64_t rows = problem_.N - n < rows_per_chunk_ ? problem_.N - n : rows_per_chunk_;
    const std::int64_t len = problem_.HW - s < piece_ ? problem_.HW - s : piece_;
    first = plane * problem_.HW + s;
    return op_.block(problem_.dtype, first, rows, len, problem_.C * problem_.HW, plane * mask_row_ + s / 8,
                     problem_.C * mask_row_);
  }

  void reduce(std::int64_t c, std::int64_t chunk, const ReduceCoefficients& coefficients, ChannelSums& sums) const {
    std::int64_t first;
    ReduceArgs args;
    args.block = block_of(c, chunk, first);
    coefficients.pass(args.coefficients);
    args.epilogue = op_.epilogue;
    args.ahead = ahead_;
    args.first = &sums.first;
    args.second = &sums.second;
    leaves_.reduce_segments[static_cast<int>(problem_.dtype)][static_cast<int>(coefficients.compute)]
                           [static_cast<int>(op_.reduce_op)](args);
  }

  void map_chunk(std::int64_t c, std::int64_t chunk, const MapCoefficients& coefficients, std::int64_t ahead) const {
    std::int64_t first;
    MapArgs args;
    args.block = block_of(c, chunk, first);
    args.ahead = ahead;
    args.reserve = ahead_;
    coefficients.pass(args.coefficients);
    map(args, first, coefficients.compute);
  }

  // The rest of the arguments is the same for every block.
  void map(MapArgs& args, std::int64_t first, Compute compute) const {
    op_.place(args, problem_.dtype, first);
    args.epilogue = op_.epilogue;
    leaves_.map_segments[static_cast<int>(problem_.dtype)][static_cast<int>(compute)][static_cast<int>(op_.map_op)](
        args);
  }

  const Problem& problem_;
  ChannelOp& op_;
  const LeafTable& leaves_;
  SamplePositions sample_positions_;
  std::int64_t mask_row_;  // bytes of a plane's mask
  std::int64_t rows_per_chunk_;
  std::int64_t pieces_per_row_;
  std::int64_t piece_;
  std::int64_t chunks_;
  std::int64_t ahead_;  // elements, whole images
};

}  // namespace

void run_channels_first(const Problem& problem, ChannelOp& op, const Parallel& parallel) {
  ChannelsFirst(problem, op).run(parallel);
}

}  // namespace bnext::cpu
