// Batch norm on the CPU: raw pointers in, raw pointers out. The caller has checked every argument, allocated every
// output and ruled out empty problems. Formulas and accuracy: common/statistics.h and docs/design.md.
//
// Bytes moved (S = bytes of the tensor): training forward 2 S where a group of channels fits the second-level
// cache (channels first), else 3 S; backward 3 S or 5 S; evaluation forward 2 S, its backward 2 S to 5 S.
// Results are the same bits for any number of threads.
#pragma once

#include <cstdint>

#include "../common/channel_vector.h"
#include "../common/problem.h"
#include "parallel.h"

namespace bnext::cpu {

// save_mean and save_invstd: length C, what a backward call needs besides the input.
struct TrainingForward {
  const void* input;
  ChannelVector weight;               // absent: 1
  ChannelVector bias;                 // absent: 0
  MutableChannelVector running_mean;  // absent: not updated; likewise running_var
  MutableChannelVector running_var;
  double momentum;  // the weight of this batch
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
};

void forward(const Problem& problem, const TrainingForward& args, const Parallel& parallel);
void forward(const Problem& problem, const EvalForward& args, const Parallel& parallel);
void backward(const Problem& problem, const Backward& args, const Parallel& parallel);

}  // namespace bnext::cpu
