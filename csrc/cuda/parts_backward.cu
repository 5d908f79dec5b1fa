#include "part_launch.cuh"

namespace bnext::cuda {
namespace {

void launch_sums(PartLaunches& launches, const BackwardOp& op) {
  if (op.args.activated()) {
    launches.sums<ActivatedGradSums>(op);
  } else if (op.args.reads_input()) {
    launches.sums<GradSums>(op);
  } else {
    launches.sums<BiasGradSum>(op);
  }
}

void launch_map(PartLaunches& launches, const BackwardOp& op) {
  if (op.args.activated()) {
    launches.map<ActivatedGrad>(op.dtype);
  } else if (op.args.differentiates_statistics()) {
    launches.map<GradInput>(op.dtype);
  } else {
    launches.map<ScaleGrad>(op.dtype);
  }
}

}  // namespace

cudaError_t backward(const Problem& problem, const Backward& args, const PartPlan& plan, const Workspace& workspace,
                     cudaStream_t stream) {
  const void* input = args.reads_input() ? args.input : nullptr;
  const void* residual = args.reads_preactivation() ? args.residual : nullptr;
  auto* const doubles = workspace.doubles;
  const PartArgs part_args{
      plan,
      {{input, args.grad_output, residual}, args.mask, {args.grad_input, args.grad_residual}, nullptr},
      {args.activation, residual != nullptr, args.mask != nullptr, args.differentiates_statistics()},
      doubles,
      nullptr};
  BackwardOp op{args, problem.dtype, /*count=*/0.0};
  double* const weight_of_parts = doubles + plan.workspace.grad_weight;
  double* const bias_of_parts = doubles + plan.workspace.grad_bias;
  if (plan.parts > 1) {
    if (args.grad_weight.data != nullptr) op.args.grad_weight = {weight_of_parts, DType::kFloat64};
    if (args.grad_bias.data != nullptr) op.args.grad_bias = {bias_of_parts, DType::kFloat64};
  }
  PartLaunches launches(part_args, stream);
  if (args.reduces()) launch_sums(launches, op);
  launches.finish(op);
  if (plan.parts > 1 && (args.grad_weight.data != nullptr || args.grad_bias.data != nullptr)) {
    launches.totals(SumOfPartsOp{args.grad_weight, args.grad_bias, weight_of_parts, bias_of_parts, plan.parts, plan.C});
  }
  if (args.maps()) launch_map(launches, op);
  return launches.error();
}

}  // namespace bnext::cuda
