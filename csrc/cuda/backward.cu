#include "launch.cuh"

namespace bnext::cuda {

Plan plan_for(const Problem& problem, const Backward& args, const DeviceLimits& limits) {
  return make_plan(problem, args.reads_input() ? 2 : 1, args.reduces(), limits);
}

cudaError_t backward(const Problem& problem, const Backward& args, const Plan& plan, void* workspace,
                     cudaStream_t stream) {
  const KernelArgs kernel_args{plan,
                               {{args.input, args.grad_output}, args.grad_input},
                               args.save_mean,
                               static_cast<unsigned char*>(workspace),
                               nullptr};
  const BackwardOp op{args, problem.dtype, static_cast<double>(problem.count())};
  if (!args.reduces()) return launch_dtype<NoSums, ScaleGrad>(kernel_args, op, stream);
  // In training grad_input is asked for together with the input, or not at all.
  if (!args.reads_input()) return launch_dtype<BiasGradSum, ScaleGrad>(kernel_args, op, stream);
  if (args.training) return launch_dtype<GradSums, GradInput>(kernel_args, op, stream);
  return launch_dtype<GradSums, ScaleGrad>(kernel_args, op, stream);
}

}  // namespace bnext::cuda
