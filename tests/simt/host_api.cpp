// The CUDA runtime's host API: what a launcher asks of the device, and what a launch may ask for.
#include <algorithm>
#include <limits>
#include <unordered_map>
#include <utility>

#include "checker.h"
#include "include/simt_host.h"

namespace simt {
namespace {

// The limits of an H100.
constexpr int kSharedPerBlock = 227 * 1024;
constexpr int kSharedPerSM = 228 * 1024;
constexpr int kReservedShared = 1024;  // of each resident block, by the system
constexpr int kDefaultShared = 48 * 1024;
constexpr int kMaxCluster = 16;
constexpr int kPortableCluster = 8;
constexpr int kBlocksPerSM = 32;
constexpr int kThreadsPerSM = 2048;
constexpr unsigned kMaxBlockThreads = 1024;
constexpr int kL2Bytes = 50 * 1024 * 1024;

struct FunctionState {
  int max_dynamic_shared = kDefaultShared;
  bool non_portable_cluster = false;
};

FunctionState& state_of(const void* function) {
  static auto& states = *new std::unordered_map<const void*, FunctionState>;
  return states[function];
}

cudaError_t last_error = cudaSuccess;

cudaError_t noted(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

int blocks_per_sm(const LaunchShape& shape) {
  const auto shared = static_cast<int>(shape.dynamic_shared) + kReservedShared;
  const int threads_of_warps = static_cast<int>((shape.threads + 31) / 32 * 32);
  return std::min({kBlocksPerSM, kThreadsPerSM / threads_of_warps, kSharedPerSM / shared});
}

// The shape has no blocks if no device could run it, or if it has several dimensions, which the emulator does not run.
LaunchShape shape_of(const cudaLaunchConfig_t& config) {
  dim3 cluster;
  bool cooperative = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative) cooperative = attribute.val.cooperative != 0;
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      cluster = dim3(attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z);
    }
  }
  bool is_possible = config.blockDim.x <= kMaxBlockThreads && cluster.x > 0 && config.gridDim.x % cluster.x == 0;
  for (const dim3& size : {config.gridDim, config.blockDim, cluster}) {
    is_possible = is_possible && size.x > 0 && size.x <= 0x7fffffff && size.y == 1 && size.z == 1;
  }
  const unsigned blocks = is_possible ? config.gridDim.x : 0;
  return {blocks, config.blockDim.x, cluster.x, config.dynamicSmemBytes, cooperative};
}

cudaError_t refusal(const LaunchShape& shape, const FunctionState& state) {
  if (shape.blocks == 0) return cudaErrorInvalidConfiguration;
  // The checker numbers threads by 24 bits, and no test runs as many.
  if (std::uint64_t{shape.blocks} * shape.threads > kMaxThreads) return cudaErrorNotSupported;
  if (shape.dynamic_shared > static_cast<std::size_t>(state.max_dynamic_shared)) return cudaErrorInvalidValue;
  const auto cluster = static_cast<int>(shape.cluster_blocks);
  if (cluster > (state.non_portable_cluster ? kMaxCluster : kPortableCluster)) return cudaErrorInvalidClusterSize;
  const DeviceLimits& limits = device().limits;
  if (limits.sms * blocks_per_sm(shape) < cluster) return cudaErrorLaunchOutOfResources;
  const int together = std::min(limits.sms, limits.cooperative_sms) * blocks_per_sm(shape);
  if (shape.cooperative && shape.blocks > static_cast<unsigned>(together / cluster * cluster)) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t set_function_attribute(const void* function, cudaFuncAttribute attribute, int value) {
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || value > kSharedPerBlock) return noted(cudaErrorInvalidValue);
      state_of(function).max_dynamic_shared = value;
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      state_of(function).non_portable_cluster = value != 0;
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout: return cudaSuccess;
  }
  return noted(cudaErrorInvalidValue);
}

cudaError_t max_active_clusters(int* clusters, const cudaLaunchConfig_t& config) {
  const LaunchShape shape = shape_of(config);
  if (shape.blocks == 0) return noted(cudaErrorInvalidConfiguration);
  *clusters = device().limits.sms * blocks_per_sm(shape) / static_cast<int>(shape.cluster_blocks);
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const Kernel& kernel) {
  const LaunchShape shape = shape_of(config);
  const cudaError_t refused = refusal(shape, state_of(kernel.function));
  if (refused != cudaSuccess) return noted(refused);
  ++device().counters.launches;
  Launch launch(shape, kernel);
  launch.run();
  return noted(launch.failed() ? cudaErrorLaunchFailure : cudaSuccess);
}

}  // namespace simt

cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return simt::noted(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = simt::device().limits.sms; break;
    case cudaDevAttrL2CacheSize: *value = simt::kL2Bytes; break;
    case cudaDevAttrMaxGridDimX: *value = std::numeric_limits<int>::max(); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = simt::kSharedPerSM; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = simt::kSharedPerBlock; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = simt::kReservedShared; break;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrClusterLaunch: *value = 1; break;
  }
  return cudaSuccess;
}
