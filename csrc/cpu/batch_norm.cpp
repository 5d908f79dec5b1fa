#include "batch_norm.h"

#include "../common/channel_ops.h"
#include "isa.h"
#include "traversal.h"

namespace bnext::cpu {
namespace {

const ChannelLeaves<TrainingForwardOp>& leaves_of(const TrainingForwardOp&) { return current_leaves().training; }
const ChannelLeaves<EvalForwardOp>& leaves_of(const EvalForwardOp&) { return current_leaves().evaluation; }
const ChannelLeaves<BackwardOp>& leaves_of(const BackwardOp&) { return current_leaves().backward; }

// The mathematics of common/channel_ops.h behind the interface that the traversals know.
template <typename Op>
class Adapter final : public ChannelOp {
 public:
  explicit Adapter(const Op& op) : op_(op), leaves_(leaves_of(op)) {}

  void reduce_coefficients(const Channels& channels) const override { leaves_.reduce_coefficients(op_, channels); }
  bool find_doubtful(const Channels& channels, std::uint8_t* doubtful) const override {
    return leaves_.find_doubtful(op_, channels, doubtful);
  }
  double better_shift(const ChannelSums& sums) const override { return op_.better_shift(sums); }
  void finish(const Channels& channels) const override { leaves_.finish(op_, channels); }

 private:
  Op op_;
  const ChannelLeaves<Op>& leaves_;
};

// Of all that a call reads and writes. What is streamed is not read only to be overwritten, which is a third of the
// traffic, and leaves the caches to inputs that are read twice. Planes that are read once keep their outputs in a
// third-level cache that may hold them; rows of channels do not gain by it.
constexpr std::int64_t kFarBytes = std::int64_t{4} << 20;
constexpr std::int64_t kStreamedBytes = std::int64_t{18} << 20;
constexpr std::int64_t kStreamedOnceBytes = std::int64_t{28} << 20;

void run(const Problem& problem, ChannelOp& op, const Parallel& parallel) {
  const std::int64_t bytes = problem.numel() * element_size(problem.dtype) * (op.inputs() + op.outputs());
  op.far = bytes >= kFarBytes;
  const bool once = !op.reduces && problem.layout == Layout::kChannelsFirst;
  op.streams = bytes >= (once ? kStreamedOnceBytes : kStreamedBytes);
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
  Adapter op(TrainingForwardOp{args, problem.dtype, count_of(problem)});
  set_forward(op, args);
  op.reduces = true;
  op.samples = true;
  op.reduce_op = ReduceOp::kMomentSums;
  run(problem, op, parallel);
  count_batch(args.running);
}

void merge(const Merge& args) {
  const MergeOp op{args};
  for (std::int64_t c = 0; c < args.C; ++c) op.finish(c);
  count_batch(args.running);
}

void forward(const Problem& problem, const EvalForward& args, const Parallel& parallel) {
  Adapter op(EvalForwardOp{args, problem.dtype});
  set_forward(op, args);
  run(problem, op, parallel);
}

void backward(const Problem& problem, const Backward& args, const Parallel& parallel) {
  Adapter op(BackwardOp{args, problem.dtype, count_of(problem)});
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
