// CTA groups: the blocks that work on one tile, and the all-reduce of their sums.
//
// Every block adds up all of the group's sums itself, in the order of the blocks, so that all of them get the same bits
// and go on without a second barrier. What a block publishes lies in one of two places in turn (`round` is even or
// odd): it is overwritten only after another barrier, which no block passes before it has read.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "launch_plan.h"

namespace bnext::cuda {

#if defined(__CUDACC__)
// What this thread knows to have been written is visible to whoever acquires the counter.
__device__ __forceinline__ void bnext_add_release(unsigned* counter, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}
__device__ __forceinline__ unsigned bnext_load_acquire(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
#endif

// A barrier among the blocks of one group of a cooperative launch, which has them all running at once. The counter
// starts at zero and is never reset; `round` counts the barriers passed so far.
__device__ __forceinline__ void grid_group_barrier(unsigned* counter, unsigned group_blocks, unsigned round) {
  __syncthreads();
  if (threadIdx.x == 0) {
    bnext_add_release(counter, 1);
    while (bnext_load_acquire(counter) < (round + 1) * group_blocks) __nanosleep(32);
  }
  __syncthreads();
}

__device__ __forceinline__ void cluster_barrier() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __trap();
#endif
}

// What lies at `own` in the cluster's block `rank`.
__device__ __forceinline__ const double* of_cluster_block(double* own, int rank) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(own, rank);
#else
  (void)rank;
  __trap();
  return own;
#endif
}

struct GroupRank {
  int group;
  int rank;
  unsigned round;  // all-reduces so far
};

// own: this block's `values` sums, in shared memory, written by any of its threads, at an address that depends on the
// round's parity. workspace: Group::kGrid only, a counter for each group, then [group][2: parity][block][values].
// Returns the group's sums, readable by all threads of the block.
__device__ __forceinline__ const double* all_reduce(const LaunchPlan& plan, GroupRank& self, unsigned char* workspace,
                                                    double* own, double* total, double* merge, int values) {
  const int t = static_cast<int>(threadIdx.x);
  const int threads = plan.threads;
  if (plan.group == Group::kBlock) {
    __syncthreads();
    return own;
  }
  if (plan.group == Group::kCluster) {
    cluster_barrier();
    for (int i = t; i < values; i += threads) {
      // All are asked for before the first is needed: each takes its time.
      double part[kMaxCluster];
#pragma unroll
      for (int rank = 0; rank < kMaxCluster; ++rank) {
        part[rank] = rank < plan.group_blocks ? of_cluster_block(own, rank)[i] : 0.0;
      }
      double sum = 0.0;
#pragma unroll
      for (int rank = 0; rank < kMaxCluster; ++rank) sum += part[rank];
      total[i] = sum;
    }
    ++self.round;
    __syncthreads();
    return total;
  }
  unsigned* counter = reinterpret_cast<unsigned*>(workspace) + self.group;
  double* published = reinterpret_cast<double*>(workspace + plan.counter_bytes) +
                      (std::int64_t{self.group} * 2 + (self.round & 1)) * plan.group_blocks * values;
  __syncthreads();
  for (int i = t; i < values; i += threads) published[std::int64_t{self.rank} * values + i] = own[i];
  grid_group_barrier(counter, static_cast<unsigned>(plan.group_blocks), self.round);
  ++self.round;
  // Several threads add up one value where there are enough of them. Read from L2: L1 may hold an older round.
  const int most = values < threads ? threads / values : 1;
  const int adders = most < plan.group_blocks ? most : plan.group_blocks;
  for (int i = t; i < adders * values; i += threads) {
    double sum = 0.0;
    for (int block = i / values; block < plan.group_blocks; block += adders) {
      sum += __ldcg(published + std::int64_t{block} * values + i % values);
    }
    (adders == 1 ? total : merge)[i] = sum;
  }
  __syncthreads();
  if (adders == 1) return total;
  for (int i = t; i < values; i += threads) {
    double sum = 0.0;
    for (int adder = 0; adder < adders; ++adder) sum += merge[adder * values + i];
    total[i] = sum;
  }
  __syncthreads();
  return total;
}

}  // namespace bnext::cuda
