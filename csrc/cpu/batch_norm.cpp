#include "batch_norm.h"

#include "../common/channel_ops.h"
#include "isa/dispatch.h"
#include "traversal.h"

namespace bnext::cpu {
namespace {

// Bytes that a call reads and writes, all together. A non-temporal store does not read the line that it overwrites,
// which is a third of the traffic, and leaves the caches to inputs that are read twice. Planes that are read once keep
// their outputs in a third-level cache that may hold them; rows of channels do not gain by it. Nor do short planes,
// whose first and last lines are stored through the caches, where those may hold all.
constexpr std::int64_t kL2Bytes = std::int64_t{4} << 20;
constexpr std::int64_t kNonTemporalBytes = std::int64_t{18} << 20;
constexpr std::int64_t kNonTemporalOnceBytes = std::int64_t{28} << 20;
constexpr std::int64_t kNonTemporalShortBytes = std::int64_t{40} << 20;
constexpr std::int64_t kShortPlaneBytes = 1280;

void run(const Problem& problem, ChannelOp& op, const Parallel& parallel) {
  const std::int64_t bytes = problem.numel() * element_size(problem.dtype) * (op.inputs() + op.outputs());
  op.exceeds_l2 = bytes >= kL2Bytes;
  const bool planes = problem.layout == Layout::kChannelsFirst;
  const bool short_planes = planes && problem.HW * element_size(problem.dtype) < kShortPlaneBytes;
  const bool once = planes && !op.reduces;
  op.non_temporal = bytes >= (short_planes ? kNonTemporalShortBytes : once ? kNonTemporalOnceBytes : kNonTemporalBytes);
  if (problem.layout == Layout::kChannelsFirst) {
    run_channels_first(problem, op, parallel);
  } else {
    run_channels_last(problem, op, parallel);
  }
}

// What training and evaluation share.
template <typename Args>
void set_forward(ChannelOp& op, const Args& args) {
  op.in[0] = args.input;
  op.in[2] = args.epilogue.residual;
  op.out[0] = args.output;
  op.mask = args.epilogue.mask;
  op.epilogue.activation = args.epilogue.activation;
  op.epilogue.has_residual = args.epilogue.residual != nullptr;
  op.map_op = args.epilogue.present() ? MapOp::kActivatedNormalize : MapOp::kNormalize;
}

void count_batch(const Running& running) {
  if (running.num_batches_tracked != nullptr) ++*running.num_batches_tracked;
}

double count_of(const Problem& problem) { return static_cast<double>(problem.count()); }

}  // namespace

void forward(const Problem& problem, const TrainingForward& args, const Parallel& parallel) {
  const TrainingForwardOp math{args, problem.dtype, count_of(problem)};
  ChannelOp op{&math, current_kernels().training};
  set_forward(op, args);
  op.reduces = true;
  op.samples = true;
  op.reduce_op = ReduceOp::kMomentSums;
  run(problem, op, parallel);
  count_batch(args.running);
}

void gather_stats(const GatherStats& args) {
  const GatherStatsOp op{args};
  for (std::int64_t c = 0; c < args.C; ++c) op.finish(c);
  count_batch(args.running);
}

void forward(const Problem& problem, const EvalForward& args, const Parallel& parallel) {
  const EvalForwardOp math{args, problem.dtype};
  ChannelOp op{&math, current_kernels().evaluation};
  set_forward(op, args);
  run(problem, op, parallel);
}

void backward(const Problem& problem, const Backward& args, const Parallel& parallel) {
  const BackwardOp math{args, problem.dtype, count_of(problem)};
  ChannelOp op{&math, current_kernels().backward};
  op.in[0] = args.reads_input() ? args.input : nullptr;
  op.in[1] = args.grad_output;
  op.in[2] = args.reads_preactivation() ? args.residual : nullptr;
  op.out[0] = args.grad_input;
  op.out[1] = args.grad_residual;
  op.mask = const_cast<std::uint8_t*>(args.mask);  // only read in backward
  op.epilogue = {args.activation, op.in[2] != nullptr, args.mask != nullptr, args.differentiates_statistics()};
  op.reduces = args.reduces();
  if (args.activated()) {
    op.reduce_op = ReduceOp::kActivatedGradSums;
    op.map_op = MapOp::kActivatedGrad;
  } else {
    op.reduce_op = args.reads_input() ? ReduceOp::kGradSums : ReduceOp::kBiasGradSum;
    op.map_op = args.differentiates_statistics() ? MapOp::kGradInput : MapOp::kScaleGrad;
  }
  run(problem, op, parallel);
}

}  // namespace bnext::cpu
