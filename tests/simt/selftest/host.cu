// The host's API: what a launch may ask for, and what the device says of itself.
#include "case.h"

namespace selftest {
namespace {

using simt::Access;

__global__ void do_nothing() {}
__global__ void do_nothing_in_much_memory() {}
__global__ void do_nothing_in_large_clusters() {}

void shared_limit() {
  require(launch({.shared = 49152}, do_nothing) == cudaSuccess, "48 KB need no attribute");
  require(launch({.shared = 49153}, do_nothing) == cudaErrorInvalidValue, "more need it");
  cudaGetLastError();
  const auto grow = [](int bytes) {
    return cudaFuncSetAttribute(do_nothing_in_much_memory, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  require(grow(227 * 1024 + 1) == cudaErrorInvalidValue, "more than the device has");
  require(grow(227 * 1024) == cudaSuccess, "all it has");
  require(launch({.shared = 227 * 1024}, do_nothing_in_much_memory) == cudaSuccess, "launched");
}

void block_limit() {
  require(launch({.block = 1024}, do_nothing) == cudaSuccess, "1024 threads");
  require(launch({.block = 1025}, do_nothing) == cudaErrorInvalidConfiguration, "no more");
  require(launch({.block = {32, 2}}, do_nothing) == cudaErrorInvalidConfiguration, "one dimension only");
  require(launch({.grid = 0}, do_nothing) == cudaErrorInvalidConfiguration, "no empty grid");
}

void cluster_limit() {
  simt::set_device({.sms = 16});
  require(launch({.grid = 16, .cluster = 8}, do_nothing) == cudaSuccess, "8 are portable");
  require(launch({.grid = 16, .cluster = 16}, do_nothing_in_large_clusters) == cudaErrorInvalidClusterSize,
          "16 are not");
  require(launch({.grid = 12, .cluster = 8}, do_nothing) == cudaErrorInvalidConfiguration, "whole clusters only");
  cudaFuncSetAttribute(do_nothing_in_large_clusters, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  require(launch({.grid = 16, .cluster = 16}, do_nothing_in_large_clusters) == cudaSuccess, "16 are allowed now");
  cudaFuncSetAttribute(do_nothing_in_large_clusters, cudaFuncAttributeNonPortableClusterSizeAllowed, 0);
}

void cooperative_limit() {
  // Two blocks of 1024 threads fit each of 4 SMs.
  require(launch({.grid = 8, .block = 1024, .cooperative = true}, do_nothing) == cudaSuccess, "fits");
  require(launch({.grid = 9, .block = 1024, .cooperative = true}, do_nothing) == cudaErrorCooperativeLaunchTooLarge,
          "does not fit");
  // Four of 48 KB and 1 KB for the system fit the 228 KB of each.
  require(launch({.grid = 16, .shared = 49152, .cooperative = true}, do_nothing) == cudaSuccess, "shared memory fits");
  require(launch({.grid = 17, .shared = 49152, .cooperative = true}, do_nothing) == cudaErrorCooperativeLaunchTooLarge,
          "shared memory does not fit");
}

void occupancy() {
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {2, 1, 1};
  const auto clusters = [&](unsigned threads, std::size_t shared) {
    const cudaLaunchConfig_t config{4, threads, shared, nullptr, &cluster, 1};
    int found = 0;
    require(cudaOccupancyMaxActiveClusters(&found, do_nothing, &config) == cudaSuccess, "answered");
    return found;
  };
  require(clusters(32, 0) == 64, "the limit of blocks");
  require(clusters(512, 0) == 8, "the limit of threads");
  require(clusters(512, 100 * 1024) == 4, "the limit of shared memory");
}

void attributes() {
  simt::set_device({.sms = 7});
  const auto value = [](cudaDeviceAttr attribute) {
    int result = -1;
    require(cudaDeviceGetAttribute(&result, attribute, 0) == cudaSuccess, "known");
    return result;
  };
  int device = -1;
  require(cudaGetDevice(&device) == cudaSuccess && device == 0, "the only device");
  require(value(cudaDevAttrMultiProcessorCount) == 7, "as set");
  require(value(cudaDevAttrClusterLaunch) == 1 && value(cudaDevAttrCooperativeLaunch) == 1, "capable");
  int none;
  require(cudaDeviceGetAttribute(&none, cudaDevAttrClusterLaunch, 1) == cudaErrorInvalidDevice, "no second device");
}

__global__ void write_argument(long value, float scale, int* output) {
  *output = static_cast<int>(static_cast<float>(value) * scale);
}

void arguments() {
  // Converted as by a call: an int to the long, a double to the float.
  require(output_of<int>(1, {.block = 1}, write_argument, 21, 2.0)[0] == 42, "passed");
}

__global__ void note_order(unsigned* counter, unsigned* order) {
  if (threadIdx.x == 0) order[atomicAdd(counter, 1)] = blockIdx.x;
}

void orders() {
  const auto order_of = [](std::uint64_t seed) {
    simt::set_options({seed, is_checked()});
    Buffer<unsigned> counter("counter", 1, Access::kReadWrite);
    return output_of<unsigned>(16, {.grid = 16, .block = 1024}, note_order, counter.data());
  };
  require(order_of(3) == order_of(3), "a seed says which order");
  require(order_of(3) != order_of(4), "another seed says another");
}

void counters() {
  launch({.grid = 3, .block = 40}, do_nothing);
  require(simt::take_counters().launches == 1, "counted");
  require(simt::take_counters().launches == 0, "since the last call");
}

}  // namespace

std::vector<Case> host_cases() {
  return {
      {"shared_limit", nullptr, shared_limit},   {"block_limit", nullptr, block_limit},
      {"cluster_limit", nullptr, cluster_limit}, {"cooperative_limit", nullptr, cooperative_limit},
      {"occupancy", nullptr, occupancy},         {"device_attributes", nullptr, attributes},
      {"arguments", nullptr, arguments},         {"orders", nullptr, orders},
      {"counters", nullptr, counters},
  };
}

}  // namespace selftest
