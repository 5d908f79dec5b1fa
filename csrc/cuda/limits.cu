#include "batch_norm.h"

namespace bnext::cuda {
namespace {

// Compiled as all kernels are, so that its attributes tell for which architecture they were compiled.
__global__ void probe_kernel() {}

// Blocks of the largest cluster that is worth having. A cluster lies in one group of SMs, whose number need not be a
// multiple of the large ones: these may leave no more than a quarter of the device idle, with a block an SM.
int largest_cluster(const DeviceLimits& limits) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kMaxCluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kMaxCluster);
  config.blockDim = dim3(kMaxThreads);
  config.dynamicSmemBytes = static_cast<std::size_t>(limits.shared_per_block);
  int most = 0;
  int at_once = 0;
  cudaError_t error = cudaSuccess;
  const auto go_on = [&](auto&& call) {
    if (error == cudaSuccess) error = call();
  };
  go_on([&] { return cudaFuncSetAttribute(&probe_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1); });
  go_on([&] {
    return cudaFuncSetAttribute(&probe_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_per_block);
  });
  go_on([&] { return cudaOccupancyMaxPotentialClusterSize(&most, &probe_kernel, &config); });
  if (error == cudaSuccess && most >= kMaxCluster) {
    config.attrs = &attribute;
    config.numAttrs = 1;
    error = cudaOccupancyMaxActiveClusters(&at_once, &probe_kernel, &config);
    if (error == cudaSuccess && 4 * at_once * kMaxCluster >= 3 * limits.sms) return kMaxCluster;
  }
  // A device that cannot answer has the others all the same.
  cudaGetLastError();
  return kPortableCluster;
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
  error = cudaFuncGetAttributes(&code, &probe_kernel);
  // A device with clusters may be running code for one without, translated by the driver.
  limits->max_cluster = error == cudaSuccess && clusters != 0 && code.ptxVersion >= 90 ? largest_cluster(*limits) : 1;
  return error;
}

}  // namespace bnext::cuda
