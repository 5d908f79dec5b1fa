// Batches of several parts (Problem::virtual_batch), each of which is a call of its own.
#pragma once

#include <cstdint>

#include "../common/arguments.h"
#include "../common/problem.h"
#include "parallel.h"

namespace bnext::cpu {

struct Part {
  Part(const Problem& whole, std::int64_t index);

  TrainingForward of(TrainingForward args) const;
  EvalForward of(EvalForward args) const;
  Backward of(Backward args) const;

  Problem problem;
  std::int64_t index;

 private:
  template <typename T>
  void advance_data(T*& data) const;
  void advance_forward(ForwardEpilogue& epilogue, double*& save_mean, double*& save_invstd) const;

  std::int64_t elements_;    // before this part
  std::int64_t mask_bytes_;  // likewise
  std::int64_t stats_;
};

// Calls f(part, parallel) for each part: many parts concurrently, a thread each; few one by one, with all threads each.
template <typename F>
void for_each_part(const Problem& problem, const Parallel& parallel, F&& f) {
  const std::int64_t parts = problem.parts();
  if (parts < kEnoughTasks) {
    for (std::int64_t p = 0; p < parts; ++p) f(Part(problem, p), parallel);
    return;
  }
  parallel(parts, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p) f(Part(problem, p), Parallel::serial());
  });
}

}  // namespace bnext::cpu
