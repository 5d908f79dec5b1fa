// The arguments of a batch-norm call, as raw pointers: what the tensor level hands to the kernels of any device. The
// caller has checked every argument, allocated every output and ruled out empty problems.
#pragma once

#include <cstdint>

#include "activation.h"
#include "channel_vector.h"
#include "inline.h"

namespace bnext {

// What a forward call does to an element after normalising it: act(y + residual).
struct ForwardEpilogue {
  Activation activation;
  const void* residual = nullptr;  // laid out as the input
  std::uint8_t* mask = nullptr;    // null, or written for a rectifier's backward pass: where it is open (mask.h)

  BNEXT_INLINE bool present() const { return activation.act != Act::kIdentity || residual != nullptr; }
};

// What a training call does to the running statistics.
struct Running {
  MutableChannelVector mean;  // absent: not updated; likewise var
  MutableChannelVector var;
  std::int64_t* num_batches_tracked = nullptr;  // null: not counted
  bool cumulative = false;                      // the n-th batch weighs 1/n; needs the counter
  double momentum = 0.0;                        // else the weight of this batch
};

// save_mean and save_invstd: length C, what a backward call needs besides the input. Where the batch has several parts
// (problem.h), part p's vectors start 2*C*p elements further on, here and in a backward call.
struct TrainingForward {
  const void* input;
  ChannelVector weight;  // absent: 1
  ChannelVector bias;    // absent: 0
  Running running;
  double eps;
  void* output;  // null: only the statistics are wanted
  double* save_mean;
  double* save_invstd;
  ForwardEpilogue epilogue;
  double* save_m2 = nullptr;     // null, or sum of (x - mean)^2, with which save_invstd may be null
  double* save_count = nullptr;  // with save_m2: one number, the values of a channel without padding; null: all
};

// The statistics of a batch that is spread over several processes, from those of the local batches.
struct GatherStats {
  const double* local_stats;  // (processes, 2*C + 1): means, sums of (x - mean)^2, and the count of values a channel
  std::int64_t processes;
  std::int64_t C;
  Running running;
  double* mean;
  double* var;  // biased
};

struct EvalForward {
  const void* input;
  ChannelVector weight;
  ChannelVector bias;
  ChannelVector running_mean;
  ChannelVector running_var;
  double eps;
  void* output;
  double* save_mean;    // = running_mean
  double* save_invstd;  // = 1/sqrt(running_var + eps)
  ForwardEpilogue epilogue;
  ChannelVector invstd;  // if given, replaces running_var and eps, for the same bits as an earlier call's
};

struct Backward {
  const void* grad_output;
  const void* input;  // null: nothing that is asked for depends on it
  ChannelVector weight;
  const double* save_mean;
  const double* save_invstd;
  bool training;
  // The means of dz*xhat and of dz over a batch on several processes; absent: computed from this process's values.
  ChannelVector mean_dz_xhat;
  ChannelVector mean_dz;
  void* grad_input;  // each null if not asked for
  MutableChannelVector grad_weight;
  MutableChannelVector grad_bias;
  // Where the forward call had an activation:
  Activation activation;
  ChannelVector bias;
  const void* residual = nullptr;
  const std::uint8_t* mask = nullptr;  // if given, read in place of the pre-activation and what it is computed from
  void* grad_residual = nullptr;

  BNEXT_INLINE bool activated() const { return activation.act != Act::kIdentity; }
  BNEXT_INLINE bool reads_preactivation() const { return activated() && mask == nullptr; }
  // Whether the statistics depend on the input: grad_input has terms for the mean and the variance.
  BNEXT_INLINE bool differentiates_statistics() const { return training && grad_input != nullptr; }
  BNEXT_INLINE bool reads_input() const {
    return grad_weight.data != nullptr || differentiates_statistics() || reads_preactivation();
  }
  BNEXT_INLINE bool reduces() const {
    const bool needs_means = differentiates_statistics() && mean_dz.data == nullptr;
    return grad_weight.data != nullptr || grad_bias.data != nullptr || needs_means;
  }
  BNEXT_INLINE bool maps() const { return grad_input != nullptr || grad_residual != nullptr; }
};

}  // namespace bnext
