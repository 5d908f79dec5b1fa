// From a plan to a launch: attributes, dtype and tile dispatch.
#pragma once

#include <atomic>

#include "../common/dispatch.h"
#include "batch_norm.h"
#include "batch_norm_kernel.cuh"

namespace bnext::cuda {

// A kernel's attributes are set once per device, to all that the device has: set to what one launch needs, they could
// be lowered by another thread before this one has launched.
template <auto kKernel>
cudaError_t set_kernel_attributes() {
  static std::atomic<std::uint64_t> done{0};
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::uint64_t bit = device < 64 ? std::uint64_t{1} << device : 0;
  if ((done.load(std::memory_order_acquire) & bit) != 0) return cudaSuccess;
  DeviceLimits limits = {};
  error = current_limits(&limits);
  const auto allow = [&](cudaFuncAttribute attribute, int value) {
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kKernel, attribute, value);
  };
  allow(cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_per_block);
  // The plan counts on two blocks an SM, and only a few reads gain from L1.
  allow(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  // Where this is refused, it was refused to current_limits() too, and no plan has clusters of a size that needs it.
  if (cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) {
    cudaGetLastError();
  }
  done.fetch_or(bit, std::memory_order_release);
  return error;
}

template <auto kKernel, typename Op>
cudaError_t launch(const KernelArgs& args, const Op& op, cudaStream_t stream) {
  const LaunchPlan& plan = args.plan;
  cudaError_t error = set_kernel_attributes<kKernel>();
  if (error != cudaSuccess) return error;

  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(plan.groups) * static_cast<unsigned>(plan.group_blocks));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(plan.shared.bytes);
  config.stream = stream;
  config.attrs = &attribute;
  if (plan.group == Group::kCluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(plan.group_blocks);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    config.numAttrs = 1;
  } else if (plan.group == Group::kGrid) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.numAttrs = 1;
  }
  error = cudaLaunchKernelEx(&config, kKernel, args, op);
  return error != cudaSuccess ? error : cudaGetLastError();
}

template <typename scalar_t, typename Reduce, typename Map, typename Op>
cudaError_t launch_tile(const KernelArgs& args, const Op& op, cudaStream_t stream) {
  return args.plan.tile == Tile::kChannel
             ? launch<&batch_norm_kernel<scalar_t, Op, Reduce, Map, Tile::kChannel>>(args, op, stream)
             : launch<&batch_norm_kernel<scalar_t, Op, Reduce, Map, Tile::kColumns>>(args, op, stream);
}

template <typename Reduce, typename Map, typename Op>
cudaError_t launch_dtype(const KernelArgs& args, const Op& op, cudaStream_t stream) {
  return dispatch(op.dtype,
                  [&](auto tag) { return launch_tile<typename decltype(tag)::Type, Reduce, Map>(args, op, stream); });
}

}  // namespace bnext::cuda
