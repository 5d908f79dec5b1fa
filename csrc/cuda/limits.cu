#include "batch_norm.h"

namespace bnext::cuda {

cudaError_t current_limits(DeviceLimits* limits) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  int clusters = 0;
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  get(&limits->sms, cudaDevAttrMultiProcessorCount);
  get(&limits->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(&limits->shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  get(&limits->reserved_shared, cudaDevAttrReservedSharedMemoryPerBlock);
  get(&clusters, cudaDevAttrClusterLaunch);
  limits->max_cluster = clusters != 0 ? kMaxCluster : 1;
  return error;
}

}  // namespace bnext::cuda
