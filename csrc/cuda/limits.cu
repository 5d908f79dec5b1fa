#include "batch_norm.h"

namespace bnext::cuda {
namespace {

// Compiled as all kernels are, so that its attributes tell the architecture that all were compiled for.
__global__ void probe_kernel() {}

// How many clusters of `blocks` blocks the driver can run at once, with per_sm blocks an SM; 0: none.
int clusters_at_once(const DeviceLimits& limits, int blocks, int per_sm) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(kMaxThreads / per_sm));
  config.dynamicSmemBytes = static_cast<std::size_t>(
      per_sm == 1 ? limits.shared_per_block : limits.shared_per_sm / per_sm - limits.reserved_shared);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, &probe_kernel, &config) == cudaSuccess) return clusters;
  cudaGetLastError();
  return 0;
}

// Clusters that leave more than a quarter of the device idle, with a block an SM, are not worth having.
void ask_for_clusters(DeviceLimits& limits) {
  const bool allowed =
      cudaFuncSetAttribute(&probe_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_per_block) ==
          cudaSuccess &&
      cudaFuncSetAttribute(&probe_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
  if (!allowed) cudaGetLastError();
  for (int i = 0; i < kClusterSizes; ++i) {
    const int blocks = 2 << i;
    for (int per_sm = 1; per_sm <= kBlocksPerSM; ++per_sm) {
      limits.clusters_at_once[per_sm - 1][i] = clusters_at_once(limits, blocks, per_sm);
    }
    if (4 * limits.clusters_at_once[0][i] * blocks < 3 * limits.sms) return;
    limits.max_cluster = blocks;
  }
}

}  // namespace

cudaError_t current_limits(DeviceLimits* limits) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  int clusters = 0;
  int cooperative = 0;
  *limits = {};
  limits->max_cluster = 1;
  get(&limits->sms, cudaDevAttrMultiProcessorCount);
  get(&limits->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(&limits->shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  get(&limits->reserved_shared, cudaDevAttrReservedSharedMemoryPerBlock);
  get(&limits->max_grid, cudaDevAttrMaxGridDimX);
  get(&limits->l2_bytes, cudaDevAttrL2CacheSize);
  get(&cooperative, cudaDevAttrCooperativeLaunch);
  get(&clusters, cudaDevAttrClusterLaunch);
  if (error != cudaSuccess) return error;
  limits->cooperative = cooperative != 0;
  cudaFuncAttributes code = {};
  error = cudaFuncGetAttributes(&code, &probe_kernel);
  // A device with clusters may run code that the driver has translated from an architecture without them.
  if (error == cudaSuccess && clusters != 0 && code.ptxVersion >= 90) ask_for_clusters(*limits);
  return error;
}

}  // namespace bnext::cuda
