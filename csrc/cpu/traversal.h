// "Reduce each channel, then map each element": the two traversals, one for each layout, and what they are told.
#pragma once

#include <cstdint>

#include "../common/channel_ops.h"
#include "../common/problem.h"
#include "../common/samples.h"
#include "leaves.h"
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
class ChannelOp {
 public:
  virtual ~ChannelOp() = default;

  const void* in[kMaxInputs] = {};  // input, grad_output, residual
  void* out[2] = {};                // output or grad_input, grad_residual
  std::uint8_t* mask = nullptr;     // common/mask.h
  Epilogue epilogue;
  bool reduces = false;
  bool streams = false;  // outputs are larger than the caches
  bool samples = false;  // the shift is a sample of the channel's own values
  ReduceOp reduce_op = ReduceOp::kMomentSums;
  MapOp map_op = MapOp::kNormalize;

  bool maps() const { return out[0] != nullptr || out[1] != nullptr; }

  int inputs() const {
    int n = 0;
    for (const void* each : in) n += each != nullptr ? 1 : 0;
    return n;
  }

  // The block whose first element has the offset `first` in the tensor, and its bit in the mask the byte `first_bits`.
  Block block(DType dtype, std::int64_t first, std::int64_t rows, std::int64_t len, std::int64_t stride,
              std::int64_t first_bits, std::int64_t mask_stride) const {
    Block block = {{}, rows, len, stride, mask == nullptr ? nullptr : mask + first_bits, mask_stride};
    for (int k = 0; k < kMaxInputs; ++k) block.in[k] = advance(in[k], first, dtype);
    return block;
  }

  // Where the results of that block go.
  void place(MapArgs& args, DType dtype, std::int64_t first) const {
    args.streams = streams;
    for (int k = 0; k < 2; ++k) args.out[k] = advance(out[k], first, dtype);
  }

  // False if float32 was not enough for these sums; the channel is then reduced again in float64, shifted by
  // better_shift().
  virtual bool accurate(const ChannelSums& sums) const = 0;
  virtual double better_shift(const ChannelSums& sums) const = 0;

  // What the reduction needs besides a sampled shift.
  virtual void reduce_coefficients(std::int64_t c, double (&coefficients)[kMaxReduceCoefficients]) const = 0;

  // Takes a channel's sums, stores what the caller asked for, and returns the map's coefficients. Called once for
  // each channel, possibly from several threads at once.
  virtual void finish(std::int64_t c, const ChannelSums& sums, double (&coefficients)[kMaxCoefficients]) = 0;
};

// Both give the same bits for any number of threads: what is added to what, and in which order, depends on the
// problem alone.
void run_channels_first(const Problem& problem, ChannelOp& op, const Parallel& parallel);
void run_channels_last(const Problem& problem, ChannelOp& op, const Parallel& parallel);

// What the two traversals share.

constexpr std::int64_t kChunkElements = 65536;  // of one reduction task

// A channel's coefficients, in both types that its elements may be computed in, and which of them it is to be.
template <int kMax>
struct Coefficients {
  double value[kMax] = {};  // those the functor does not use stay zero
  float single[kMax] = {};
  Compute compute = Compute::kFloat64;

  // Float32, unless it does not hold them.
  void settle(DType dtype) {
    compute = fits_float32(value, kMax) ? natural_compute(dtype) : Compute::kFloat64;
    for (int k = 0; k < kMax; ++k) single[k] = static_cast<float>(value[k]);
  }

  void pass(const void* (&to)[kMax]) const {
    for (int k = 0; k < kMax; ++k) {
      to[k] = compute == Compute::kFloat32 ? static_cast<const void*>(&single[k]) : &value[k];
    }
  }
};

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace bnext::cpu
