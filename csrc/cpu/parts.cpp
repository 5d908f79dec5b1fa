#include "parts.h"

#include <algorithm>

#include "../common/mask.h"
#include "traversal.h"

namespace bnext::cpu {

Part::Part(const Problem& whole, std::int64_t index) : problem(whole), index(index) {
  const std::int64_t images = whole.parts() == 1 ? whole.N : whole.virtual_batch;
  const std::int64_t first = index * images;
  const std::int64_t mask_rows = whole.layout == Layout::kChannelsFirst ? whole.C : whole.HW;  // of an image
  problem.N = std::min(images, whole.N - first);
  problem.virtual_batch = 0;
  if (whole.valid != nullptr) problem.valid = whole.valid + first * whole.HW;
  elements_ = first * whole.C * whole.HW;
  mask_bytes_ = first * mask_rows * mask_row_bytes(mask_row_elements(whole), kCpuMaskLanes);
  stats_ = 2 * index * whole.C;
}

template <typename T>
void Part::advance_data(T*& data) const {
  data = advance(data, elements_, problem.dtype);
}

void Part::advance_forward(ForwardEpilogue& epilogue, double*& save_mean, double*& save_invstd) const {
  advance_data(epilogue.residual);
  if (epilogue.mask != nullptr) epilogue.mask += mask_bytes_;
  save_mean += stats_;
  if (save_invstd != nullptr) save_invstd += stats_;
}

TrainingForward Part::of(TrainingForward args) const {
  advance_data(args.input);
  advance_data(args.output);
  advance_forward(args.epilogue, args.save_mean, args.save_invstd);
  return args;
}

// Where there are several parts, the statistics in `args` are each part's own, as an earlier call saved them.
EvalForward Part::of(EvalForward args) const {
  advance_data(args.input);
  advance_data(args.output);
  advance_forward(args.epilogue, args.save_mean, args.save_invstd);
  for (ChannelVector* stats : {&args.running_mean, &args.invstd})
    stats->data = advance(stats->data, stats_, stats->dtype);
  return args;
}

Backward Part::of(Backward args) const {
  advance_data(args.grad_output);
  advance_data(args.input);
  advance_data(args.residual);
  advance_data(args.grad_input);
  advance_data(args.grad_residual);
  if (args.mask != nullptr) args.mask += mask_bytes_;
  args.save_mean += stats_;
  args.save_invstd += stats_;
  return args;
}

}  // namespace bnext::cpu
