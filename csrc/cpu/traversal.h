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
  return static_cast<char*>(base) + elements * element_size(dtype);
}

// A forward or backward call, as a traversal sees it.
class ChannelOp {
 public:
  virtual ~ChannelOp() = default;

  const void* in[2] = {nullptr, nullptr};  // input, grad_output
  void* out = nullptr;                     // null: there is nothing to map
  bool reduces = false;
  ReduceOp reduce_op = ReduceOp::kMomentSums;
  MapOp map_op = MapOp::kNormalize;
  const double* shift = nullptr;  // length C, for the reduction; null: a sample of the channel's own values

  int inputs() const { return (in[0] != nullptr ? 1 : 0) + (in[1] != nullptr ? 1 : 0); }

  // The inputs' block whose first element has the offset `first` in the tensor.
  Block block(DType dtype, std::int64_t first, std::int64_t rows, std::int64_t len, std::int64_t stride) const {
    return {{advance(in[0], first, dtype), advance(in[1], first, dtype)}, rows, len, stride};
  }

  // False if float32 was not enough for these sums; the channel is then reduced again in float64, shifted by
  // better_shift().
  virtual bool accurate(const ChannelSums& sums) const = 0;
  virtual double better_shift(const ChannelSums& sums) const = 0;

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

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace bnext::cpu
