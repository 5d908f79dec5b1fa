// CTA groups: the blocks that work on one tile, and the all-reduce of their sums.
//
// All blocks get the same bits, because the order of the additions depends on the plan alone. In a small group every
// block adds up all of the group's sums itself, and needs no second barrier. Where that would be too many reads
// (plan.share > 0), each block adds up a share of the values for the whole group, and all read the totals after another
// barrier. A block's published sums are double-buffered, by the parity of `round`: they are overwritten only after
// another barrier, which no block reaches before it has read them. The totals need one buffer: a block that writes the
// next ones has passed the next round's first barrier, which no block reaches before it has read the last ones.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "block_sum.cuh"

namespace bnext::cuda {

#if defined(__CUDACC__)
// Writes that happen before a release are visible to a thread that has acquired the counter. Returns the value from
// before the addition.
__device__ __forceinline__ unsigned bnext_add_acq_rel(unsigned* counter, unsigned value) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(value) : "memory");
  return before;
}
__device__ __forceinline__ unsigned bnext_load_acquire(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
#endif

// A barrier among the blocks of one group, which all run at once because the launch is cooperative. Together the blocks
// add 2^31 to the counter: when the last has arrived, its upper bit changes and the others are zero again. So it serves
// the next barrier as it is, also one of another launch and of another number of blocks.
__device__ __forceinline__ void grid_group_barrier(unsigned* counter, int group_blocks) {
  constexpr unsigned kPhase = 1u << 31;
  __syncthreads();
  if (threadIdx.x == 0) {
    const bool is_first = static_cast<int>(blockIdx.x) % group_blocks == 0;
    const unsigned share = is_first ? kPhase - static_cast<unsigned>(group_blocks - 1) : 1u;
    const unsigned before = bnext_add_acq_rel(counter, share);
    unsigned now = before + share;
    while (((before ^ now) & kPhase) == 0) {
      __nanosleep(32);
      now = bnext_load_acquire(counter);
    }
  }
  __syncthreads();
}

__device__ __forceinline__ void cluster_barrier_arrive() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  (void)cooperative_groups::this_cluster().barrier_arrive();
#else
  __trap();
#endif
}

__device__ __forceinline__ void cluster_barrier_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().barrier_wait();
#else
  __trap();
#endif
}

__device__ __forceinline__ void cluster_barrier() {
  cluster_barrier_arrive();
  cluster_barrier_wait();
}

// The address of `own` in the shared memory of the cluster's block `rank`.
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
  int rank;
  unsigned round;  // all-reduces so far
};

// Calls store(i, sum over the group's blocks) for `count` values. published: double [block][values], from the first of
// these on. Threads share a sum, through `merge`, and load several blocks' parts at once, to overlap the latencies.
template <typename Store>
__device__ __forceinline__ void sum_published(const LaunchPlan& plan, const double* published, int values, int count,
                                              double* merge, Store&& store) {
  constexpr int kAtOnce = 8;
  const int most = count < plan.threads ? plan.threads / count : 1;
  const int adders = most < plan.group_blocks ? most : plan.group_blocks;
  for (int i = static_cast<int>(threadIdx.x); i < adders * count; i += plan.threads) {
    double sum = 0.0;
#pragma unroll 1
    for (int block = i / count; block < plan.group_blocks; block += kAtOnce * adders) {
      double part[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int b = block + k * adders;
        // Read from L2: L1 may hold an older round.
        part[k] = b < plan.group_blocks ? __ldcg(published + std::int64_t{b} * values + i % count) : 0.0;
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) sum += part[k];
    }
    if (adders == 1) {
      store(i, sum);
    } else {
      merge[i] = sum;
    }
  }
  if (adders == 1) return;
  __syncthreads();
  sum_parts(plan.threads, count, adders, [&](int i, int adder) { return merge[adder * count + i]; }, store);
}

// own: this block's `values` sums, in shared memory, written by any of its threads, at an address that depends on the
// round's parity. workspace: Group::kGrid only. Returns the group's sums, readable by all threads of the block.
__device__ __forceinline__ const double* all_reduce(const LaunchPlan& plan, GroupRank& self, const Workspace& workspace,
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
      // All loads are issued before the first value is needed, so that their latencies overlap.
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
  const int group = static_cast<int>(blockIdx.x) / plan.group_blocks;  // computed again: kept, it would take a register
  unsigned* counter = workspace.counters + group;
  double* all = workspace.doubles;
  double* published = all + (std::int64_t{group} * 2 + (self.round & 1)) * plan.group_blocks * values;
  __syncthreads();
  for (int i = t; i < values; i += threads) published[std::int64_t{self.rank} * values + i] = own[i];
  grid_group_barrier(counter, plan.group_blocks);
  if (plan.share == 0) {
    sum_published(plan, published, values, values, merge, [&](int i, double sum) { total[i] = sum; });
  } else {
    double* totals = all + (std::int64_t{plan.groups} * 2 * plan.group_blocks + group) * values;
    const int first = self.rank * plan.share;
    const int left = values - first;
    const int count = left < plan.share ? left : plan.share;
    if (count > 0) {
      sum_published(plan, published + first, values, count, merge, [&](int i, double sum) { totals[first + i] = sum; });
    }
    grid_group_barrier(counter, plan.group_blocks);
    for (int i = t; i < values; i += threads) total[i] = __ldcg(totals + i);
  }
  ++self.round;
  __syncthreads();
  return total;
}

}  // namespace bnext::cuda
