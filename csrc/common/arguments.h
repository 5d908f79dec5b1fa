// The arguments of a batch-norm call, as raw pointers: what the tensor level hands to the kernels of any device. The
// caller has checked every argument, allocated every output and ruled out empty problems.
#pragma once

#include <cstdint>

#include "channel_vector.h"

namespace bnext {

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
};

struct Backward {
  const void* grad_output;
  const void* input;  // null: neither grad_weight nor, in training, grad_input is asked for
  ChannelVector weight;
  const double* save_mean;
  const double* save_invstd;
  bool training;
  void* grad_input;  // each null if not asked for
  MutableChannelVector grad_weight;
  MutableChannelVector grad_bias;

  // What of the input's values the call depends on; where nothing, input may be null.
  bool reads_input() const { return grad_weight.data != nullptr || (training && grad_input != nullptr); }
  bool reduces() const { return reads_input() || grad_bias.data != nullptr; }
};

}  // namespace bnext
