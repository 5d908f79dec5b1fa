#include "launch.cuh"

namespace bnext::cuda {
namespace {

__global__ void count_kernel(std::int64_t* counter) { ++*counter; }

}  // namespace

cudaError_t count_batch(std::int64_t* num_batches_tracked, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(1);
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, &count_kernel, num_batches_tracked);
  return error != cudaSuccess ? error : cudaGetLastError();
}

Plan plan_for(const Problem& problem, const TrainingForward&, const DeviceLimits& limits) {
  return make_plan(problem, 1, /*reduces=*/true, limits);
}

Plan plan_for(const Problem& problem, const EvalForward&, const DeviceLimits& limits) {
  return make_plan(problem, 1, /*reduces=*/false, limits);
}

cudaError_t forward(const Problem& problem, const TrainingForward& args, const Plan& plan, void* workspace,
                    cudaStream_t stream) {
  // The cumulative average needs the counter as it was, in every block: it is counted after all of them have ended.
  std::int64_t* counted = args.cumulative ? nullptr : args.num_batches_tracked;
  const KernelArgs kernel_args{
      plan, {{args.input, nullptr}, args.output}, nullptr, static_cast<unsigned char*>(workspace), counted};
  const TrainingForwardOp op{args, problem.dtype, static_cast<double>(problem.count())};
  const cudaError_t error = launch_dtype<MomentSums, Normalize>(kernel_args, op, stream);
  if (error != cudaSuccess || counted == args.num_batches_tracked) return error;
  return count_batch(args.num_batches_tracked, stream);
}

cudaError_t forward(const Problem& problem, const EvalForward& args, const Plan& plan, void* workspace,
                    cudaStream_t stream) {
  const KernelArgs kernel_args{
      plan, {{args.input, nullptr}, args.output}, nullptr, static_cast<unsigned char*>(workspace), nullptr};
  return launch_dtype<NoSums, Normalize>(kernel_args, EvalForwardOp{args, problem.dtype}, stream);
}

}  // namespace bnext::cuda
