#include "launch.cuh"

namespace bnext::cuda {

// Instantiated in backward_activated.cu.
extern template cudaError_t launch_dtype<ActivatedGradSums, ActivatedGrad>(const KernelArgs&, const BackwardOp&,
                                                                           cudaStream_t);

LaunchPlan plan_for(const Problem& problem, const Backward& args, const DeviceLimits& limits) {
  const bool reads_residual = args.reads_preactivation() && args.residual != nullptr;
  KernelTraits traits = {};
  traits.inputs = 1 + (args.reads_input() ? 1 : 0) + (reads_residual ? 1 : 0);
  traits.reads_mask = args.mask != nullptr;
  traits.reduces = args.reduces();
  traits.activated = args.activated();
  return make_launch_plan(problem, traits, limits);
}

cudaError_t backward(const Problem& problem, const Backward& args, const LaunchPlan& plan, const Workspace& workspace,
                     cudaStream_t stream) {
  const void* input = args.reads_input() ? args.input : nullptr;
  const void* residual = args.reads_preactivation() ? args.residual : nullptr;
  const KernelArgs kernel_args{
      plan,
      {{input, args.grad_output, residual}, args.mask, {args.grad_input, args.grad_residual}, nullptr},
      {args.activation, residual != nullptr, args.mask != nullptr, args.differentiates_statistics()},
      workspace,
      nullptr};
  const BackwardOp op{args, problem.dtype, static_cast<double>(problem.count())};
  // A call without sums runs the kernel that has the same map: one more kernel would have to be compiled.
  if (args.activated()) return launch_dtype<ActivatedGradSums, ActivatedGrad>(kernel_args, op, stream);
  if (!args.reads_input()) return launch_dtype<BiasGradSum, ScaleGrad>(kernel_args, op, stream);
  if (args.differentiates_statistics()) return launch_dtype<GradSums, GradInput>(kernel_args, op, stream);
  return launch_dtype<GradSums, ScaleGrad>(kernel_args, op, stream);
}

}  // namespace bnext::cuda
