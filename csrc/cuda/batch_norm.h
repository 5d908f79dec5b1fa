// Batch norm on CUDA devices: raw pointers and a stream in, a cudaError_t out. Everything is enqueued on the stream; no
// function waits for it. Data pointers are aligned to 16 bytes. Formulas and accuracy: common/statistics.h and
// docs/numerics.md; geometry and bytes moved: launch_plan.h and batch_norm_kernel.cuh.
#pragma once

#include <cuda_runtime.h>

#include "../common/arguments.h"
#include "launch_plan.h"
#include "part_plan.h"

namespace bnext::cuda {

cudaError_t current_limits(DeviceLimits* limits);

LaunchPlan plan_for(const Problem& problem, const TrainingForward& args, const DeviceLimits& limits);
LaunchPlan plan_for(const Problem& problem, const EvalForward& args, const DeviceLimits& limits);
LaunchPlan plan_for(const Problem& problem, const Backward& args, const DeviceLimits& limits);

// Calls launch(plan), which returns the launch's error. Only the launch can tell that the blocks of the grid cannot all
// run at once, as in a process that has only a part of the device: the call is then planned again without
// Group::kGrid.
template <typename Args, typename Launch>
cudaError_t plan_and_launch(const Problem& problem, const Args& args, DeviceLimits limits, Launch&& launch) {
  const cudaError_t error = launch(plan_for(problem, args, limits));
  if (error != cudaErrorCooperativeLaunchTooLarge) return error;
  cudaGetLastError();
  limits.cooperative = false;
  return launch(plan_for(problem, args, limits));
}

// workspace: what the plan says.
cudaError_t forward(const Problem& problem, const TrainingForward& args, const LaunchPlan& plan,
                    const Workspace& workspace, cudaStream_t stream);
cudaError_t forward(const Problem& problem, const EvalForward& args, const LaunchPlan& plan, const Workspace& workspace,
                    cudaStream_t stream);
cudaError_t backward(const Problem& problem, const Backward& args, const LaunchPlan& plan, const Workspace& workspace,
                     cudaStream_t stream);

// The same for a problem that has_parts(), by the kernels for padding and for batches of several parts (part_plan.h).
// workspace: as above.
cudaError_t forward(const Problem& problem, const TrainingForward& args, const PartPlan& plan,
                    const Workspace& workspace, cudaStream_t stream);
cudaError_t forward(const Problem& problem, const EvalForward& args, const PartPlan& plan, const Workspace& workspace,
                    cudaStream_t stream);
cudaError_t backward(const Problem& problem, const Backward& args, const PartPlan& plan, const Workspace& workspace,
                     cudaStream_t stream);

// Merges the local batches' statistics, with one thread per channel.
cudaError_t gather_stats(const GatherStats& args, cudaStream_t stream);

// Adds one to the counter.
cudaError_t count_batch(std::int64_t* num_batches_tracked, cudaStream_t stream);

}  // namespace bnext::cuda
