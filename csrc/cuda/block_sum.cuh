// Sums over a block's threads, added in an order that depends on the number of parts alone.
#pragma once

#include <cuda_runtime.h>

#include "launch_plan.h"

namespace bnext::cuda {

__device__ __forceinline__ double warp_sum(double value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

// Calls store(i, part(i, 0) + ... + part(i, each - 1)) for every i < count. A power of two of threads share each sum:
// as many as it has parts at most, and at most a warp.
template <typename Part, typename Store>
__device__ __forceinline__ void sum_parts(int threads, int count, int each, Part&& part, Store&& store) {
  const int t = static_cast<int>(threadIdx.x);
  int lanes = 1;
  while (2 * lanes <= each && lanes < 32) lanes *= 2;
  const int at_once = threads / lanes;
  for (int begin = 0; begin < count; begin += at_once) {
    const int i = begin + t / lanes;
    double sum = 0.0;
    if (i < count) {
      for (int j = t % lanes; j < each; j += lanes) sum += part(i, j);
    }
    for (int distance = lanes / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    if (t % lanes == 0 && i < count) store(i, sum);
  }
}

}  // namespace bnext::cuda
