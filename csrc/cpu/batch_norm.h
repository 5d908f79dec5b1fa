// Batch norm on the CPU: raw pointers in, raw pointers out. Formulas and accuracy: common/statistics.h and
// docs/numerics.md.
//
// Bytes moved (S = bytes of the tensor): training forward 2 S where a group of channels fits the second-level
// cache (channels first), else 3 S; backward 3 S or 5 S; evaluation forward 2 S, its backward 2 S to 5 S.
// Results are bit-identical for any number of threads.
#pragma once

#include "../common/arguments.h"
#include "../common/problem.h"
#include "parallel.h"

namespace bnext::cpu {

void forward(const Problem& problem, const TrainingForward& args, const Parallel& parallel);
void forward(const Problem& problem, const EvalForward& args, const Parallel& parallel);
void gather_stats(const GatherStats& args);
void backward(const Problem& problem, const Backward& args, const Parallel& parallel);

}  // namespace bnext::cpu
