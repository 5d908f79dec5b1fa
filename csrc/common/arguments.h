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
  std::uint8_t* mask = nullptr;    // null, or where to note for a rectifier's backward pass what it let through

  BNEXT_INLINE bool present() const { return activation.act != Act::kIdentity || residual != nullptr; }
};

// save_mean and save_invstd: length C, what a backward call needs besides the input.
struct TrainingForward {
  const void* input;
  ChannelVector weight;               // absent: 1
  ChannelVector bias;                 // absent: 0
  MutableChannelVector running_mean;  // absent: not updated; likewise running_var
  MutableChannelVector running_var;
  std::int64_t* num_batches_tracked;  // null: not counted
  bool cumulative;                    // the n-th batch weighs 1/n; needs the counter
  double momentum;                    // else the weight of this batch
  double eps;
  void* output;
  double* save_mean;
  double* save_invstd;
  ForwardEpilogue epilogue;
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
};

struct Backward {
  const void* grad_output;
  const void* input;  // null: nothing that is asked for depends on it
  ChannelVector weight;
  const double* save_mean;
  const double* save_invstd;
  bool training;
  void* grad_input;  // each null if not asked for
  MutableChannelVector grad_weight;
  MutableChannelVector grad_bias;
  // of a forward call with an activation
  Activation activation;
  ChannelVector bias;
  const void* residual = nullptr;
  const std::uint8_t* mask = nullptr;  // instead of what the pre-activation is made of
  void* grad_residual = nullptr;

  BNEXT_INLINE bool activated() const { return activation.act != Act::kIdentity; }
  BNEXT_INLINE bool reads_preactivation() const { return activated() && mask == nullptr; }
  // Whether grad_input takes the detour by the statistics.
  BNEXT_INLINE bool differentiates_statistics() const { return training && grad_input != nullptr; }
  BNEXT_INLINE bool reads_input() const {
    return grad_weight.data != nullptr || differentiates_statistics() || reads_preactivation();
  }
  BNEXT_INLINE bool reduces() const {
    return grad_weight.data != nullptr || differentiates_statistics() || grad_bias.data != nullptr;
  }
  BNEXT_INLINE bool maps() const { return grad_input != nullptr || grad_residual != nullptr; }
};

}  // namespace bnext
