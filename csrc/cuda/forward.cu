#include "launch.cuh"

namespace bnext::cuda {
namespace {

constexpr int kGatherThreads = 128;

__global__ void count_kernel(std::int64_t* counter) { ++*counter; }

__global__ void gather_stats_kernel(const __grid_constant__ GatherStatsOp op) {
  const std::int64_t c = std::int64_t{blockIdx.x} * kGatherThreads + threadIdx.x;
  if (c < op.args.C) op.finish(c);
}

// Counts the batch after the kernels that read the old count, for the cumulative average, have ended.
cudaError_t count_after(cudaError_t error, const Running& running, cudaStream_t stream) {
  if (error != cudaSuccess || running.num_batches_tracked == nullptr) return error;
  return count_batch(running.num_batches_tracked, stream);
}

KernelTraits traits(const ForwardEpilogue& epilogue, bool reduces) {
  return {/*inputs=*/1, /*reads_mask=*/false, reduces, epilogue.present()};
}

template <typename Reduce, typename Args, typename Op>
cudaError_t launch_forward(const LaunchPlan& plan, const Args& args, const Op& op, const Workspace& workspace,
                           std::int64_t* counted, cudaStream_t stream) {
  const ForwardEpilogue& after = args.epilogue;
  const KernelArgs kernel_args{plan,
                               {{args.input, nullptr, after.residual}, nullptr, {args.output, nullptr}, after.mask},
                               {after.activation, after.residual != nullptr, /*has_mask=*/false},
                               workspace,
                               counted};
  return after.present() ? launch_dtype<Reduce, ActivatedNormalize>(kernel_args, op, stream)
                         : launch_dtype<Reduce, Normalize>(kernel_args, op, stream);
}

}  // namespace

cudaError_t count_batch(std::int64_t* num_batches_tracked, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(1);
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, &count_kernel, num_batches_tracked);
  return error != cudaSuccess ? error : cudaGetLastError();
}

LaunchPlan plan_for(const Problem& problem, const TrainingForward& args, const DeviceLimits& limits) {
  return make_launch_plan(problem, traits(args.epilogue, /*reduces=*/true), limits);
}

LaunchPlan plan_for(const Problem& problem, const EvalForward& args, const DeviceLimits& limits) {
  return make_launch_plan(problem, traits(args.epilogue, /*reduces=*/false), limits);
}

cudaError_t forward(const Problem& problem, const TrainingForward& args, const LaunchPlan& plan,
                    const Workspace& workspace, cudaStream_t stream) {
  const TrainingForwardOp op{args, problem.dtype, static_cast<double>(problem.count())};
  const Running& running = args.running;
  if (!running.cumulative) {
    return launch_forward<MomentSums>(plan, args, op, workspace, running.num_batches_tracked, stream);
  }
  return count_after(launch_forward<MomentSums>(plan, args, op, workspace, nullptr, stream), running, stream);
}

cudaError_t gather_stats(const GatherStats& args, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((args.C + kGatherThreads - 1) / kGatherThreads));
  config.blockDim = dim3(kGatherThreads);
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, &gather_stats_kernel, GatherStatsOp{args});
  return count_after(error != cudaSuccess ? error : cudaGetLastError(), args.running, stream);
}

cudaError_t forward(const Problem& problem, const EvalForward& args, const LaunchPlan& plan, const Workspace& workspace,
                    cudaStream_t stream) {
  return launch_forward<NoSums>(plan, args, EvalForwardOp{args, problem.dtype}, workspace, nullptr, stream);
}

}  // namespace bnext::cuda
