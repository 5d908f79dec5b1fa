// Measures what benchmarks/cuda/model.py assumes of a GPU, and prints it as JSON: the copy rate, copies in runs of a
// few bytes of a row as channels_last tiles make them, barriers of a cluster and of a grid, and latencies of loads.
//
//     nvcc -std=c++17 -O3 -arch=native -o probes benchmarks/cuda/probes.cu && ./probes
//
// Takes some seconds and 2 GB of memory. Barriers and counters are those of the kernels.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cuda/launch_plan.h"
// launch_plan.h before cta_group.cuh, which uses its types.
#include "../../csrc/cuda/cta_group.cuh"

using namespace bnext::cuda;

namespace {

constexpr std::int64_t kBytes = std::int64_t{1} << 29;  // of a tensor; beyond any L2
constexpr int kRounds = 1000;
constexpr int kTimes = 5;
constexpr int kClusterBlocks = 16;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "probes: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Rows of `width` vectors. A group of group_blocks blocks copies a strip of `run` vectors of every row, then its next.
__global__ void copy_strips(const uint4* from, uint4* to, std::int64_t rows, int width, int run, int group_blocks) {
  const int groups = static_cast<int>(gridDim.x) / group_blocks;
  const int rank = static_cast<int>(blockIdx.x) % group_blocks;
  const int rows_at_once = static_cast<int>(blockDim.x) / run;
  for (int strip = static_cast<int>(blockIdx.x) / group_blocks; strip < width / run; strip += groups) {
    const std::int64_t column = strip * run + static_cast<int>(threadIdx.x) % run;
    const std::int64_t step = std::int64_t{group_blocks} * rows_at_once;
#pragma unroll 8
    for (std::int64_t row = rank * rows_at_once + static_cast<int>(threadIdx.x) / run; row < rows; row += step) {
      to[row * width + column] = from[row * width + column];
    }
  }
}

__global__ void cluster_barriers() {
  for (int i = 0; i < kRounds; ++i) cluster_barrier();
}

__global__ void grid_barriers(unsigned* counter) {
  for (int i = 0; i < kRounds; ++i) grid_group_barrier(counter, static_cast<int>(gridDim.x));
}

// Dependent loads from the next block's shared memory.
__global__ void remote_loads(double* result) {
  extern __shared__ double own[];
  if (threadIdx.x == 0) own[0] = 0.0;
  cluster_barrier();
  const int next = (static_cast<int>(blockIdx.x) + 1) % kClusterBlocks;
  double at = 0.0;
  for (int i = 0; i < kRounds; ++i) at = *of_cluster_block(own + static_cast<int>(at), next);
  cluster_barrier();
  if (at != 0.0) *result = at;
}

// Dependent loads along a chain, past L1. They go on where the last launch ended.
__global__ void chained_loads(const std::int64_t* chain, std::int64_t* result) {
  std::int64_t at = *result;
  for (int i = 0; i < kRounds; ++i) at = __ldcg(chain + at);
  *result = at;
}

// The least seconds of some launches, after one that is not timed.
template <typename Launch>
double seconds(Launch&& launch) {
  cudaEvent_t begin = nullptr;
  cudaEvent_t end = nullptr;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  float least = 1e30f;
  for (int i = 0; i <= kTimes; ++i) {
    check(cudaEventRecord(begin));
    launch();
    check(cudaGetLastError());
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float ms = 0.0f;
    check(cudaEventElapsedTime(&ms, begin, end));
    if (i > 0) least = std::min(least, ms);
  }
  check(cudaEventDestroy(begin));
  check(cudaEventDestroy(end));
  return least / 1e3;
}

double seconds_of_chain(std::int64_t* chain, std::int64_t length, std::int64_t stride, std::int64_t* result) {
  std::vector<std::int64_t> next(static_cast<std::size_t>(length), 0);
  for (std::int64_t i = 0; i < length; ++i) next[static_cast<std::size_t>(i)] = (i + stride) % length;
  check(cudaMemcpy(chain, next.data(), next.size() * sizeof(std::int64_t), cudaMemcpyHostToDevice));
  check(cudaMemset(result, 0, sizeof *result));
  return seconds([&] { chained_loads<<<1, 1>>>(chain, result); });
}

}  // namespace

int main() {
  int sms = 0;
  check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, 0));
  uint4* from = nullptr;
  uint4* to = nullptr;
  std::int64_t* result = nullptr;
  check(cudaMalloc(&from, kBytes));
  check(cudaMalloc(&to, kBytes));
  check(cudaMalloc(&result, 256));
  check(cudaMemset(from, 1, kBytes));
  const double copy = seconds([&] { check(cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice)); });
  std::printf("{\n  \"copy_rate\": {\"value\": %.0f, \"unit\": \"GB/s\"},\n", 2.0 * kBytes / copy / 1e9);

  // Channels of 1 KB a pixel. Two groups at once, as a plan for a grid has them, of two blocks an SM.
  const int width = 1024 / kVectorBytes;
  for (const int run_bytes : {32, 64, 128, 256, 512, 1024}) {
    const double strips = seconds([&] {
      copy_strips<<<2 * sms, kThreads>>>(from, to, kBytes / 1024, width, run_bytes / kVectorBytes, sms);
    });
    std::printf("  \"rate_of_runs_of_%d\": {\"value\": %.0f, \"unit\": \"GB/s\"},\n", run_bytes,
                2.0 * kBytes / strips / 1e9);
  }

  check(cudaMemset(result, 0, 256));
  const double grid = seconds([&] {
    auto* counter = reinterpret_cast<unsigned*>(result);
    void* arguments[] = {&counter};
    check(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(&grid_barriers), dim3(2 * sms), dim3(kThreads), arguments,
                                      0, nullptr));
  });
  std::printf("  \"grid_barrier\": {\"value\": %.0f, \"unit\": \"ns\"},\n", grid * 1e9 / kRounds);

  const auto in_clusters = [&](auto* kernel, auto... arguments) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kClusterBlocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(kClusterBlocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = sizeof(double);
    config.attrs = &attribute;
    config.numAttrs = 1;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    return seconds([&] { check(cudaLaunchKernelEx(&config, kernel, arguments...)); });
  };
  std::printf("  \"cluster_barrier\": {\"value\": %.0f, \"unit\": \"ns\"},\n",
              in_clusters(&cluster_barriers) * 1e9 / kRounds);
  std::printf("  \"remote_read\": {\"value\": %.0f, \"unit\": \"ns\"},\n",
              in_clusters(&remote_loads, reinterpret_cast<double*>(result)) * 1e9 / kRounds);

  auto* chain = reinterpret_cast<std::int64_t*>(from);
  const double near = seconds_of_chain(chain, std::int64_t{1} << 16, 4099, result);
  const double far = seconds_of_chain(chain, kBytes / 8, (std::int64_t{1} << 16) + 4099, result);
  std::printf("  \"l2_read\": {\"value\": %.0f, \"unit\": \"ns\"},\n", near * 1e9 / kRounds);
  std::printf("  \"memory\": {\"value\": %.0f, \"unit\": \"ns\"}\n}\n", far * 1e9 / kRounds);
  return 0;
}
