#include "part_launch.cuh"

namespace bnext::cuda {
namespace {

template <typename Args>
PartArgs part_args(const PartPlan& plan, const Args& args, const Workspace& workspace, std::int64_t* count_batches) {
  const ForwardEpilogue& after = args.epilogue;
  return {plan,
          {{args.input, nullptr, after.residual}, nullptr, {args.output, nullptr}, after.mask},
          {after.activation, after.residual != nullptr, /*has_mask=*/false},
          workspace.doubles,
          count_batches};
}

template <typename Args>
void launch_map(PartLaunches& launches, const Problem& problem, const Args& args) {
  if (args.output == nullptr) return;
  if (args.epilogue.present()) {
    launches.map<ActivatedNormalize>(problem.dtype);
  } else {
    launches.map<Normalize>(problem.dtype);
  }
}

}  // namespace

cudaError_t forward(const Problem& problem, const TrainingForward& args, const PartPlan& plan,
                    const Workspace& workspace, cudaStream_t stream) {
  PartLaunches launches(part_args(plan, args, workspace, args.running.num_batches_tracked), stream);
  TrainingForwardOp op{args, problem.dtype, /*count=*/0.0};
  auto* const doubles = workspace.doubles;
  if (plan.parts > 1) {
    op.args.running = {};
    op.args.save_m2 = doubles + plan.workspace.m2;
  }
  launches.sums<MomentSums>(op);
  launches.finish(op);
  if (plan.parts > 1 && (args.running.mean.data != nullptr || args.running.var.data != nullptr)) {
    launches.totals(UpdateByPartsOp{args.running, plan.parts, plan.C, args.save_mean, op.args.save_m2,
                                    doubles + plan.workspace.counts});
  }
  launch_map(launches, problem, args);
  return launches.error();
}

cudaError_t forward(const Problem& problem, const EvalForward& args, const PartPlan& plan, const Workspace& workspace,
                    cudaStream_t stream) {
  PartLaunches launches(part_args(plan, args, workspace, nullptr), stream);
  launches.finish(EvalForwardOp{args, problem.dtype});
  launch_map(launches, problem, args);
  return launches.error();
}

}  // namespace bnext::cuda
