// The CUDA runtime's host API: what a launcher asks of the device, and what a launch may ask for.
#include <algorithm>
#include <cstring>
#include <limits>
#include <unordered_map>
#include <utility>

#include "checker.h"
#include "host_lock.h"
#include "include/simt_host.h"

namespace simt {
namespace {

constexpr int kDefaultShared = 48 * 1024;
constexpr int kPortableCluster = 8;
constexpr unsigned kMaxBlockThreads = 1024;

struct FunctionState {
  int max_dynamic_shared = kDefaultShared;
  bool non_portable_cluster = false;
};

FunctionState& state_of(const void* function) {
  static auto& states = *new std::unordered_map<const void*, FunctionState>;
  return states[function];
}

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t noted(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

int blocks_per_sm(unsigned threads, std::size_t dynamic_shared) {
  const DeviceLimits& limits = device().limits;
  if (threads == 0 || threads > kMaxBlockThreads) return 0;
  const auto shared = static_cast<int>(dynamic_shared) + limits.reserved_shared;
  const int warps_threads = static_cast<int>((threads + 31) / 32 * 32);
  return std::min({limits.blocks_per_sm, limits.threads_per_sm / warps_threads, limits.shared_per_sm / shared});
}

LaunchShape shape_of(const cudaLaunchConfig_t& config) {
  LaunchShape shape{config.gridDim, config.blockDim, dim3(), config.dynamicSmemBytes, false};
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttributeValue& value = config.attrs[i].val;
    switch (config.attrs[i].id) {
      case cudaLaunchAttributeIgnore: break;
      case cudaLaunchAttributeCooperative: shape.cooperative = value.cooperative != 0; break;
      case cudaLaunchAttributeClusterDimension:
        shape.cluster = dim3(value.clusterDim.x, value.clusterDim.y, value.clusterDim.z);
        break;
    }
  }
  return shape;
}

// Zero in any size makes the launch invalid, before anything divides by it.
bool is_plausible(const LaunchShape& shape) {
  const auto within = [](const dim3& size, std::uint64_t x, std::uint64_t y, std::uint64_t z) {
    return size.x > 0 && size.y > 0 && size.z > 0 && size.x <= x && size.y <= y && size.z <= z;
  };
  const bool sizes = within(shape.grid, 0x7fffffff, 0xffff, 0xffff) && within(shape.block, 1024, 1024, 64) &&
                     within(shape.cluster, 0xffff, 0xffff, 0xffff);
  return sizes && shape.threads() <= kMaxBlockThreads && shape.grid.x % shape.cluster.x == 0 &&
         shape.grid.y % shape.cluster.y == 0 && shape.grid.z % shape.cluster.z == 0;
}

int max_cluster(const FunctionState& state) {
  const int most = device().limits.max_cluster;
  return state.non_portable_cluster ? most : std::min(kPortableCluster, most);
}

cudaError_t refusal(const LaunchShape& shape, const FunctionState& state) {
  const DeviceLimits& limits = device().limits;
  if (!is_plausible(shape)) return cudaErrorInvalidConfiguration;
  // The checker numbers threads by 24 bits, and no test runs as many.
  if (std::uint64_t{shape.grid.x} * shape.grid.y * shape.grid.z * shape.threads() >= kHostThread) {
    return cudaErrorNotSupported;
  }
  if (shape.dynamic_shared > static_cast<std::size_t>(state.max_dynamic_shared)) return cudaErrorInvalidValue;
  const auto cluster = static_cast<int>(shape.cluster_blocks());
  if (cluster > 1 && limits.cc_major < 9) return cudaErrorNotSupported;
  if (cluster > max_cluster(state)) return cudaErrorInvalidClusterSize;
  const int resident = limits.sms * blocks_per_sm(shape.threads(), shape.dynamic_shared);
  if (resident < cluster) return cudaErrorLaunchOutOfResources;
  const int together = std::min(limits.sms, limits.cooperative_sms) * blocks_per_sm(shape.threads(), shape.dynamic_shared);
  if (shape.cooperative && shape.blocks() > static_cast<std::uint32_t>(together / cluster * cluster)) {
    return cudaErrorCooperativeLaunchTooLarge;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t set_function_attribute(const void* function, cudaFuncAttribute attribute, int value) {
  const HostLock lock;
  switch (attribute) {
    case cudaFuncAttributeMaxDynamicSharedMemorySize:
      if (value < 0 || value > device().limits.shared_per_block) return noted(cudaErrorInvalidValue);
      state_of(function).max_dynamic_shared = value;
      return cudaSuccess;
    case cudaFuncAttributeNonPortableClusterSizeAllowed:
      state_of(function).non_portable_cluster = value != 0;
      return cudaSuccess;
    case cudaFuncAttributePreferredSharedMemoryCarveout: return cudaSuccess;
  }
  return noted(cudaErrorInvalidValue);
}

cudaError_t function_attributes(cudaFuncAttributes* attributes, const void* function) {
  const HostLock lock;
  *attributes = {};
  attributes->maxThreadsPerBlock = static_cast<int>(kMaxBlockThreads);
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = 10 * device().limits.cc_major + device().limits.cc_minor;
  attributes->maxDynamicSharedSizeBytes = state_of(function).max_dynamic_shared;
  return cudaSuccess;
}

cudaError_t max_active_blocks(int* blocks, const void*, int block_threads, std::size_t dynamic_shared) {
  const HostLock lock;
  if (block_threads <= 0) return noted(cudaErrorInvalidValue);
  *blocks = blocks_per_sm(static_cast<unsigned>(block_threads), dynamic_shared);
  return cudaSuccess;
}

cudaError_t max_active_clusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  const HostLock lock;
  const LaunchShape shape = shape_of(*config);
  if (!is_plausible(shape)) return noted(cudaErrorInvalidConfiguration);
  const int resident = device().limits.sms * blocks_per_sm(shape.threads(), shape.dynamic_shared);
  *clusters = resident / static_cast<int>(shape.cluster_blocks());
  return cudaSuccess;
}

cudaError_t max_potential_cluster(int* blocks, const void* function, const cudaLaunchConfig_t* config) {
  const HostLock lock;
  const LaunchShape shape = shape_of(*config);
  const FunctionState& state = state_of(function);
  if (!is_plausible(shape)) return noted(cudaErrorInvalidConfiguration);
  if (shape.dynamic_shared > static_cast<std::size_t>(state.max_dynamic_shared)) return noted(cudaErrorInvalidValue);
  const int resident = device().limits.sms * blocks_per_sm(shape.threads(), shape.dynamic_shared);
  *blocks = std::min(resident, max_cluster(state));
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const Kernel& kernel) {
  const HostLock lock;
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
cudaError_t cudaPeekAtLastError() { return simt::last_error; }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorCooperativeLaunchTooLarge: return "cudaErrorCooperativeLaunchTooLarge";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorInvalidClusterSize: return "cudaErrorInvalidClusterSize";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorLaunchOutOfResources: return "too many resources requested for launch";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorInvalidClusterSize: return "invalid cluster size";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const simt::HostLock lock;
  if (device != 0) return simt::noted(cudaErrorInvalidDevice);
  const simt::DeviceLimits& limits = simt::device().limits;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = static_cast<int>(simt::kMaxBlockThreads); break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = simt::kDefaultShared; break;
    case cudaDevAttrWarpSize: *value = warpSize; break;
    case cudaDevAttrMultiProcessorCount: *value = limits.sms; break;
    case cudaDevAttrL2CacheSize: *value = limits.l2_bytes; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = limits.threads_per_sm; break;
    case cudaDevAttrComputeCapabilityMajor: *value = limits.cc_major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = limits.cc_minor; break;
    case cudaDevAttrMaxGridDimX: *value = std::numeric_limits<int>::max(); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = limits.shared_per_sm; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = limits.shared_per_block; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = limits.blocks_per_sm; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = limits.reserved_shared; break;
    case cudaDevAttrClusterLaunch: *value = limits.cc_major >= 9; break;
    default: return simt::noted(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* data, int value, std::size_t bytes, cudaStream_t) {
  const simt::HostLock lock;
  if (simt::device().options.check && !simt::check_host_access(data, bytes, simt::Kind::kWrite)) {
    return simt::noted(cudaErrorInvalidValue);
  }
  std::memset(data, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  const simt::HostLock lock;
  if (simt::device().options.check && !(simt::check_host_access(from, bytes, simt::Kind::kRead) &&
                                        simt::check_host_access(to, bytes, simt::Kind::kWrite))) {
    return simt::noted(cudaErrorInvalidValue);
  }
  std::memmove(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
