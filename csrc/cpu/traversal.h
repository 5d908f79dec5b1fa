// "Reduce each channel, then map each element": the two traversals, one for each layout, and their arguments.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/channel_ops.h"
#include "../common/problem.h"
#include "../common/samples.h"
#include "kernels.h"
#include "parallel.h"

namespace bnext::cpu {

// `base` advanced by `elements` of the dtype; null stays null.
inline const void* advance(const void* base, std::int64_t elements, DType dtype) {
  return base == nullptr ? nullptr : static_cast<const char*>(base) + elements * element_size(dtype);
}
inline void* advance(void* base, std::int64_t elements, DType dtype) {
  return base == nullptr ? nullptr : static_cast<char*>(base) + elements * element_size(dtype);
}

// A forward or backward call, as a traversal sees it.
struct ChannelOp {
  // An Op of common/channel_ops.h, and its functions.
  const void* op;
  const ChannelKernels& kernels;

  const void* in[kMaxInputs] = {};      // input, grad_output, residual
  void* out[2] = {};                    // output or grad_input, grad_residual
  std::uint8_t* mask = nullptr;         // common/mask.h
  const std::uint8_t* valid = nullptr;  // Problem::valid
  Epilogue epilogue;
  bool reduces = false;
  bool exceeds_l2 = false;                   // the tensors exceed the second-level caches
  bool non_temporal = false;                 // outputs are stored past the caches (limits: batch_norm.cpp)
  const SamplePositions* samples = nullptr;  // positions of a channel's values whose average is the shift; or null
  ReduceOp reduce_op = ReduceOp::kMomentSums;
  MapOp map_op = MapOp::kNormalize;

  int inputs() const { return (in[0] != nullptr ? 1 : 0) + (in[1] != nullptr ? 1 : 0) + (in[2] != nullptr ? 1 : 0); }
  int outputs() const { return (out[0] != nullptr ? 1 : 0) + (out[1] != nullptr ? 1 : 0); }
  bool maps() const { return outputs() != 0; }

  // The block whose first element is at offset `first` of the tensor, with its bit in byte `first_bits` of the mask.
  // The caller sets the block's valid bits.
  Block block(DType dtype, std::int64_t first, std::int64_t rows, std::int64_t len, std::int64_t stride,
              std::int64_t first_bits, std::int64_t mask_stride) const {
    Block block = {{}, rows, len, stride, mask == nullptr ? nullptr : mask + first_bits, mask_stride};
    for (int k = 0; k < kMaxInputs; ++k) block.in[k] = advance(in[k], first, dtype);
    return block;
  }

  // Runs the microkernel of the reduction, one of `kernels`. The caller has set the block, coefficients and sums.
  void reduce(const ReduceKernels& kernels, DType dtype, Compute compute, ReduceArgs& args) const {
    args.epilogue = epilogue;
    kernels[static_cast<int>(dtype)][static_cast<int>(compute)][static_cast<int>(reduce_op)](args);
  }

  // Runs the microkernel of the map, one of `kernels`. The caller has set the coefficients and the block, whose first
  // element is at offset `first` of the tensors.
  void map(const MapKernels& kernels, DType dtype, Compute compute, std::int64_t first, MapArgs& args) const {
    for (int k = 0; k < 2; ++k) args.out[k] = advance(out[k], first, dtype);
    args.epilogue = epilogue;
    args.non_temporal = non_temporal;
    args.in_order = exceeds_l2;
    kernels[static_cast<int>(dtype)][static_cast<int>(compute)][static_cast<int>(map_op)](args);
  }

  void reduce_coefficients(const Channels& channels) const { kernels.reduce_coefficients(op, channels); }
  bool find_needs_fp64(const Channels& channels, std::uint8_t* needs_fp64) const {
    return kernels.find_needs_fp64(op, channels, needs_fp64);
  }
  double refined_shift(const ChannelSums& sums) const { return kernels.refined_shift(op, sums); }
  void finish(const Channels& channels) const { kernels.finish(op, channels); }
};

// Both give the same bits for any number of threads: how sums are grouped and ordered depends on the problem alone.
void run_channels_first(const Problem& problem, const ChannelOp& op, const Parallel& parallel);
void run_channels_last(const Problem& problem, const ChannelOp& op, const Parallel& parallel);

// What the two traversals share.

constexpr std::int64_t kChunkElements = 65536;  // of one reduction task
// Channels of some images.
struct Tile {
  std::int64_t channels;
  std::int64_t images;
};

// The sums of some channels.
struct SumsTable {
  explicit SumsTable(std::int64_t channels)
      : shift(static_cast<std::size_t>(channels)), first(shift.size()), second(shift.size()) {}

  ChannelSums of(std::int64_t j) const { return {shift[j], first[j], second[j]}; }

  std::vector<double> shift;
  std::vector<double> first;
  std::vector<double> second;
};

// Coefficients of some channels, [coefficient][channel], in both types that their elements may be computed in.
struct Coefficients {
  Coefficients(int count, std::int64_t channels)
      : count(count),
        channels(channels),
        wide(static_cast<std::size_t>(count * channels)),
        single(wide.size()),
        fits(static_cast<std::size_t>(channels)) {}

  // The compute type of channel j: float32, unless its coefficients do not fit, or the data is float64.
  Compute compute(std::int64_t j) const { return fits[j] != 0 ? Compute::kFloat32 : Compute::kFloat64; }

  // How many of n channels from j on are computed in the same type as the first.
  std::int64_t alike(std::int64_t j, std::int64_t n) const {
    const std::uint8_t* const at = fits.data() + j;
    std::int64_t count = 1;
    while (count < n && at[count] == at[0]) ++count;
    return count;
  }

  // Fills `single` and `fits` for channels j < n. The caller has set their wide[k][j].
  void narrow(const KernelTable& kernels, DType dtype, std::int64_t n) {
    const bool natural = opmath_compute(dtype) == Compute::kFloat32;
    for (std::int64_t j = 0; j < n; ++j) fits[j] = natural ? 1 : 0;
    if (!natural) return;
    for (int k = 0; k < count; ++k) {
      kernels.narrow(wide.data() + k * channels, n, single.data() + k * channels, fits.data());
    }
  }

  // Points `to` at the coefficients of the channels from j on, in the type `as`.
  template <int kMax>
  void pass(std::int64_t j, Compute as, const void* (&to)[kMax]) const {
    for (int k = 0; k < count; ++k) {
      const std::int64_t at = k * channels + j;
      to[k] = as == Compute::kFloat32 ? static_cast<const void*>(single.data() + at) : wide.data() + at;
    }
  }

  int count;
  std::int64_t channels;
  std::vector<double> wide;
  std::vector<float> single;
  std::vector<std::uint8_t> fits;  // 1 where a channel's coefficients fit float32, else 0
};

// n channels from c on, which begin at index j of the tables.
inline Channels channels_of(std::int64_t c, std::int64_t n, const SumsTable& sums, Coefficients& coefficients,
                            std::int64_t j, bool stores = true) {
  return {c,
          n,
          sums.shift.data() + j,
          sums.first.data() + j,
          sums.second.data() + j,
          coefficients.wide.data() + j,
          coefficients.count,
          coefficients.channels,
          stores};
}

}  // namespace bnext::cpu
