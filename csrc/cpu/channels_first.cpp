// Channels first: a channel is N planes of HW consecutive elements, C*HW apart.
//
// A group of channels that the second-level cache holds is reduced and then mapped while it is still there, so
// that main memory sees one read and one write. Where there are too few channels to keep the threads busy, the
// same work is cut into chunks of channels, with a barrier between reducing and mapping. Where there is nothing to
// reduce, planes are mapped in the order in which they lie.

#include <memory>
#include <vector>

#include "../common/mask.h"
#include "../common/statistics.h"
#include "isa.h"
#include "traversal.h"

namespace bnext::cpu {
namespace {

constexpr std::int64_t kGroupBytes = 262144;
constexpr std::int64_t kMinGroups = 16;  // fewer tasks cannot be shared out evenly

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
  }

  void run(const Parallel& parallel) {
    const std::int64_t C = problem_.C;
    const std::int64_t channel_bytes = problem_.count() * element_size(problem_.dtype) * op_.inputs();
    if (!op_.reduces && problem_.N * C >= kMinGroups) {
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
    const std::int64_t tasks = divide_up(C, group);
    parallel(tasks, [&](std::int64_t begin, std::int64_t end) {
      const std::unique_ptr<MapCoefficients[]> coefficients(new MapCoefficients[static_cast<std::size_t>(group)]);
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t c0 = task * group;
        const std::int64_t n = C - c0 < group ? C - c0 : group;
        for (std::int64_t j = 0; j < n; ++j) {
          finish(c0 + j, op_.reduces ? reduce_channel(c0 + j) : ChannelSums{}, coefficients[j]);
        }
        if (!op_.maps()) continue;
        const std::int64_t ahead = task + 1 < end ? n * problem_.HW : 0;
        for (std::int64_t j = 0; j < n; ++j) {
          for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) map_chunk(c0 + j, chunk, coefficients[j], ahead);
        }
      }
    });
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
};

}  // namespace

void run_channels_first(const Problem& problem, ChannelOp& op, const Parallel& parallel) {
  ChannelsFirst(problem, op).run(parallel);
}

}  // namespace bnext::cpu
