// The subset of the CUDA runtime's host API that the launchers use, with the toolkit's names and signatures.
#pragma once

#include <tuple>
#include <type_traits>

#include "simt_runtime.h"

// The toolkit's numbers, so that a message means the same here and there.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
  cudaErrorInvalidClusterSize = 912,
};

enum cudaDeviceAttr {
  cudaDevAttrMaxGridDimX = 5,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
  cudaDevAttrClusterLaunch = 120,
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13,
};
enum { cudaSharedmemCarveoutMaxShared = 100 };

using cudaStream_t = struct CUstream_st*;

struct cudaFuncAttributes {
  int ptxVersion;
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    int cooperative;
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
// Device memory is the host's.
template <typename T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
  *address = &symbol;
  return cudaSuccess;
}

namespace simt {

// The toolkit's templates take any pointer to a function, which converts to no pointer to data by itself.
cudaError_t set_function_attribute(const void* function, cudaFuncAttribute attribute, int value);
cudaError_t max_active_clusters(int* clusters, const cudaLaunchConfig_t& config);
cudaError_t launch(const cudaLaunchConfig_t& config, const Kernel& kernel);

}  // namespace simt

template <typename T>
cudaError_t cudaFuncSetAttribute(T* function, cudaFuncAttribute attribute, int value) {
  return simt::set_function_attribute(reinterpret_cast<const void*>(function), attribute, value);
}
template <typename T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, T*) {
  *attributes = {.ptxVersion = 90};
  return cudaSuccess;
}
template <typename T>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, T*, const cudaLaunchConfig_t* config) {
  return simt::max_active_clusters(clusters, *config);
}

template <typename... Expected, typename... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... actual) {
  // Copied once, as a launch does: a kernel must not see what the host changes later.
  using Arguments = std::tuple<std::remove_cv_t<Expected>...>;
  static_assert((std::is_trivially_copyable_v<std::remove_cv_t<Expected>> && ...));
  const Arguments arguments(static_cast<Expected>(actual)...);
  const auto call = [](const void* function, const void* opaque) {
    std::apply(reinterpret_cast<void (*)(Expected...)>(const_cast<void*>(function)),
               *static_cast<const Arguments*>(opaque));
  };
  return simt::launch(*config, {call, reinterpret_cast<const void*>(kernel), &arguments, sizeof(arguments)});
}
