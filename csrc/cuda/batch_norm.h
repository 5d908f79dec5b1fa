// Batch norm on CUDA devices: raw pointers and a stream in, a cudaError_t out. Everything is enqueued on the stream;
// nothing waits for it. Data pointers are multiples of 16 bytes. Formulas and accuracy: common/statistics.h and
// docs/numerics.md; geometry and bytes moved: plan.h and kernel.cuh.
#pragma once

#include <cuda_runtime.h>

#include "../common/arguments.h"
#include "plan.h"

namespace bnext::cuda {

cudaError_t current_limits(DeviceLimits* limits);

Plan plan_for(const Problem& problem, const TrainingForward& args, const DeviceLimits& limits);
Plan plan_for(const Problem& problem, const EvalForward& args, const DeviceLimits& limits);
Plan plan_for(const Problem& problem, const Backward& args, const DeviceLimits& limits);

// workspace: plan.workspace_bytes of global memory, uninitialised.
cudaError_t forward(const Problem& problem, const TrainingForward& args, const Plan& plan, void* workspace,
                    cudaStream_t stream);
cudaError_t forward(const Problem& problem, const EvalForward& args, const Plan& plan, void* workspace,
                    cudaStream_t stream);
cudaError_t backward(const Problem& problem, const Backward& args, const Plan& plan, void* workspace,
                     cudaStream_t stream);

// Merges moments, a thread a channel.
cudaError_t merge(const Merge& args, cudaStream_t stream);

// Adds one to the counter.
cudaError_t count_batch(std::int64_t* num_batches_tracked, cudaStream_t stream);

}  // namespace bnext::cuda
