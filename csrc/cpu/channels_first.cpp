// Channels first: a channel is N planes of HW consecutive elements, C*HW apart.
//
// A group of channels that the second-level cache holds is reduced and then mapped while it is still there, so
// that main memory sees one read and one write. Where there are too few channels to keep the threads busy, the
// same work is cut into chunks of channels, with a barrier between reducing and mapping.

#include <memory>
#include <vector>

#include "../common/statistics.h"
#include "isa.h"
#include "traversal.h"

namespace bnext::cpu {
namespace {

constexpr std::int64_t kGroupBytes = 262144;
constexpr std::int64_t kMinGroups = 16;  // fewer cannot be shared out evenly

class ChannelsFirst {
 public:
  ChannelsFirst(const Problem& problem, ChannelOp& op)
      : problem_(problem), op_(op), leaves_(current_leaves()), sample_positions_(problem.count()) {
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
    const std::int64_t fitting = kGroupBytes / channel_bytes;
    const std::int64_t group = fitting < 1 ? 1 : fitting;
    if (divide_up(C, group) >= kMinGroups || chunks_ == 1) {
      run_fused(parallel, group);
    } else {
      run_split(parallel);
    }
  }

 private:
  struct Coefficients {
    double value[kMaxCoefficients] = {};  // those the functor does not use stay zero
  };

  void run_fused(const Parallel& parallel, std::int64_t group) {
    const std::int64_t C = problem_.C;
    const std::int64_t tasks = divide_up(C, group);
    parallel(tasks, [&](std::int64_t begin, std::int64_t end) {
      const std::unique_ptr<Coefficients[]> coefficients(new Coefficients[static_cast<std::size_t>(group)]);
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t c0 = task * group;
        const std::int64_t n = C - c0 < group ? C - c0 : group;
        for (std::int64_t j = 0; j < n; ++j) {
          ChannelSums sums;
          if (op_.reduces) {
            sums = reduce_channel(c0 + j);
          }
          op_.finish(c0 + j, sums, coefficients[j].value);
        }
        if (op_.out == nullptr) continue;
        for (std::int64_t j = 0; j < n; ++j) {
          for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) map(c0 + j, chunk, coefficients[j]);
        }
      }
    });
  }

  void run_split(const Parallel& parallel) {
    const std::int64_t C = problem_.C;
    std::vector<ChannelSums> sums(static_cast<std::size_t>(C));
    if (op_.reduces) {
      std::vector<ChannelSums> partial(static_cast<std::size_t>(C * chunks_));
      for (std::int64_t c = 0; c < C; ++c) sums[c].shift = first_shift(c);
      parallel(C * chunks_, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t task = begin; task < end; ++task) {
          partial[task].shift = sums[task / chunks_].shift;
          reduce(task / chunks_, task % chunks_, natural_compute(problem_.dtype), partial[task]);
        }
      });
      for (std::int64_t c = 0; c < C; ++c) {
        for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) {
          sums[c].first += partial[c * chunks_ + chunk].first;
          sums[c].second += partial[c * chunks_ + chunk].second;
        }
        if (!op_.accurate(sums[c])) sums[c] = reduce_again(c, sums[c]);
      }
    }
    std::vector<Coefficients> coefficients(static_cast<std::size_t>(C));
    for (std::int64_t c = 0; c < C; ++c) op_.finish(c, sums[c], coefficients[c].value);
    if (op_.out == nullptr) return;
    parallel(C * chunks_, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t task = begin; task < end; ++task)
        map(task / chunks_, task % chunks_, coefficients[task / chunks_]);
    });
  }

  double first_shift(std::int64_t c) const {
    if (op_.shift != nullptr) return static_cast<double>(rounded(op_.shift[c]));
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

  double rounded(double shift) const {
    return natural_compute(problem_.dtype) == Compute::kFloat32 ? static_cast<double>(static_cast<float>(shift))
                                                                : shift;
  }

  ChannelSums reduce_channel(std::int64_t c) const {
    ChannelSums sums;
    sums.shift = first_shift(c);
    for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) reduce(c, chunk, natural_compute(problem_.dtype), sums);
    return op_.accurate(sums) ? sums : reduce_again(c, sums);
  }

  ChannelSums reduce_again(std::int64_t c, const ChannelSums& doubtful) const {
    ChannelSums sums;
    sums.shift = op_.better_shift(doubtful);
    for (std::int64_t chunk = 0; chunk < chunks_; ++chunk) reduce(c, chunk, Compute::kFloat64, sums);
    return sums;
  }

  // The chunk's geometry; `first` is its first element's offset in the tensor.
  Block block_of(std::int64_t c, std::int64_t chunk, std::int64_t& first) const {
    const std::int64_t n = chunk / pieces_per_row_ * rows_per_chunk_;
    const std::int64_t s = chunk % pieces_per_row_ * piece_;
    Block block;
    block.rows = problem_.N - n < rows_per_chunk_ ? problem_.N - n : rows_per_chunk_;
    block.len = problem_.HW - s < piece_ ? problem_.HW - s : piece_;
    block.stride = problem_.C * problem_.HW;
    first = (n * problem_.C + c) * problem_.HW + s;
    for (int i = 0; i < 2; ++i) block.in[i] = advance(op_.in[i], first, problem_.dtype);
    return block;
  }

  void reduce(std::int64_t c, std::int64_t chunk, Compute compute, ChannelSums& sums) const {
    std::int64_t first;
    const Block block = block_of(c, chunk, first);
    const auto single = static_cast<float>(sums.shift);
    const void* shift = compute == Compute::kFloat32 ? static_cast<const void*>(&single) : &sums.shift;
    leaves_.reduce_segments[static_cast<int>(problem_.dtype)][static_cast<int>(compute)]
                           [static_cast<int>(op_.reduce_op)]({block, shift, &sums.first, &sums.second});
  }

  void map(std::int64_t c, std::int64_t chunk, const Coefficients& coefficients) const {
    std::int64_t first;
    MapArgs args;
    args.block = block_of(c, chunk, first);
    args.out = advance(op_.out, first, problem_.dtype);
    const bool single_fits = fits_float32(coefficients.value, kMaxCoefficients);
    const Compute compute = single_fits ? natural_compute(problem_.dtype) : Compute::kFloat64;
    float single[kMaxCoefficients];
    for (int k = 0; k < kMaxCoefficients; ++k) {
      single[k] = static_cast<float>(coefficients.value[k]);
      args.coefficients[k] =
          compute == Compute::kFloat32 ? static_cast<const void*>(&single[k]) : &coefficients.value[k];
    }
    leaves_.map_segments[static_cast<int>(problem_.dtype)][static_cast<int>(compute)][static_cast<int>(op_.map_op)](
        args);
  }

  const Problem& problem_;
  ChannelOp& op_;
  const LeafTable& leaves_;
  SamplePositions sample_positions_;
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
