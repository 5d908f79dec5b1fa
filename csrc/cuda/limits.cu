#include "batch_norm.h"

namespace bnext::cuda {
namespace {

// Compiled as all kernels are: says for which generation.
__global__ void witness_kernel() {}

constexpr int kPortableCluster = 8;  // blocks; every device with clusters has as many

// Blocks of the largest cluster that is worth having. A cluster lies in one group of SMs, whose number need not be a
// multiple of the large ones: these may leave no more than a quarter of the device idle, with a block an SM.
cudaError_t largest_cluster(int* blocks, const DeviceLimits& limits) {
  *blocks = kPortableCluster;
  const auto allow = [](cudaFuncAttribute attribute, int value) {
    return cudaFuncSetAttribute(&witness_kernel, attribute, value);
  };
  cudaError_t error = allow(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) error = allow(cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_per_block);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kMaxCluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kMaxCluster);
  config.blockDim = dim3(kMaxThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(limits.shared_per_block);
  int possible = 0;
  if (error == cudaSuccess) error = cudaOccupancyMaxPotentialClusterSize(&possible, &witness_kernel, &config);
  if (error != cudaSuccess || possible < kMaxCluster) return error;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int at_once = 0;
  error = cudaOccupancyMaxActiveClusters(&at_once, &witness_kernel, &config);
  if (4 * at_once * kMaxCluster >= 3 * limits.sms) *blocks = kMaxCluster;
  return error;
}

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
  limits->max_cluster = 1;
  if (error != cudaSuccess || clusters == 0 || code.ptxVersion < 90) return error;
  return largest_cluster(&limits->max_cluster, *limits);
}

}  // namespace bnext::cuda
