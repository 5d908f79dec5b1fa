#include "batch_norm.h"

namespace bnext::cuda {
namespace {

// Compiled as all kernels are: says for which generation.
__global__ void witness_kernel() {}

}  // namespace

cudaError_t current_limits(DeviceLimits* limits) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto get = [&](int* value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(value, attribute, device);
  };
  int clusters = 0;
  get(&limits->sms, cudaDevAttrMultiProcessorCount);
  get(&limits->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(&limits->shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  get(&limits->reserved_shared, cudaDevAttrReservedSharedMemoryPerBlock);
  get(&limits->max_grid, cudaDevAttrMaxGridDimX);
  get(&clusters, cudaDevAttrClusterLaunch);
  if (error != cudaSuccess) return error;
  cudaFuncAttributes code = {};
  error = cudaFuncGetAttributes(&code, &witness_kernel);
  // A device with clusters may be running code for one without, translated by the driver.
  limits->max_cluster = clusters != 0 && code.ptxVersion >= 90 ? kMaxCluster : 1;
  return error;
}

}  // namespace bnext::cuda
