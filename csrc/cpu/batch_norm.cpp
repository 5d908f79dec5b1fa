#include "batch_norm.h"

#include "../common/channel_ops.h"
#include "traversal.h"

namespace bnext::cpu {
namespace {

// The mathematics of common/channel_ops.h behind the interface that the traversals know.
template <typename Op>
class Adapter final : public ChannelOp {
 public:
  explicit Adapter(const Op& op) : op_(op) {}

  bool accurate(const ChannelSums& sums) const override { return op_.accurate(sums); }
  double better_shift(const ChannelSums& sums) const override { return op_.better_shift(sums); }
  void finish(std::int64_t c, const ChannelSums& sums, double (&coefficients)[kMaxCoefficients]) override {
    op_.finish(c, sums, /*stores=*/true, coefficients);
  }

 private:
  Op op_;
};

void run(const Problem& problem, ChannelOp& op, const Parallel& parallel) {
  if (problem.layout == Layout::kChannelsFirst) {
    run_channels_first(problem, op, parallel);
  } else {
    run_channels_last(problem, op, parallel);
  }
}

double count_of(const Problem& problem) { return static_cast<double>(problem.count()); }

}  // namespace

void forward(const Problem& problem, const TrainingForward& args, const Parallel& parallel) {
  Adapter op(TrainingForwardOp{args, problem.dtype, count_of(problem)});
  op.in[0] = args.input;
  op.out = args.output;
  op.reduces = true;
  op.reduce_op = ReduceOp::kMomentSums;
  op.map_op = MapOp::kNormalize;
  run(problem, op, parallel);
  if (args.num_batches_tracked != nullptr) ++*args.num_batches_tracked;
}

void forward(const Problem& problem, const EvalForward& args, const Parallel& parallel) {
  Adapter op(EvalForwardOp{args, problem.dtype});
  op.in[0] = args.input;
  op.out = args.output;
  op.map_op = MapOp::kNormalize;
  run(problem, op, parallel);
}

void backward(const Problem& problem, const Backward& args, const Parallel& parallel) {
  Adapter op(BackwardOp{args, problem.dtype, count_of(problem)});
  op.in[0] = args.reads_input() ? args.input : nullptr;
  op.in[1] = args.grad_output;
  op.out = args.grad_input;
  op.reduces = args.reduces();
  op.reduce_op = args.reads_input() ? ReduceOp::kGradSums : ReduceOp::kBiasGradSum;
  op.map_op = args.training ? MapOp::kGradInput : MapOp::kScaleGrad;
  op.shift = args.save_mean;
  run(problem, op, parallel);
}

}  // namespace bnext::cpu
