// Blocks of a cluster: one another's shared memory.
#include <cooperative_groups.h>

#include "case.h"

namespace selftest {
namespace {

using cooperative_groups::this_cluster;

__device__ void cluster_barrier() {
  this_cluster().barrier_arrive();
  this_cluster().barrier_wait();
}

enum class Defect { kNone, kNoFirstBarrier, kNoLastBarrier, kSingleBuffer };

// Each round, a thread reads what a neighbour in the next block of its cluster wrote, through two buffers in turn.
template <Defect kDefect, unsigned kCluster>
__global__ void rotate(float* output) {
  SHARED_VALUES(float, values);
  const unsigned rank = blockIdx.x % kCluster;
  const unsigned t = threadIdx.x;
  float mine = static_cast<float>(rank * blockDim.x + t);
  for (int round = 0; round < 4; ++round) {
    float* const buffer = values + (kDefect == Defect::kSingleBuffer ? 0 : round % 2) * blockDim.x;
    buffer[t] = mine;
    if (kDefect != Defect::kNoFirstBarrier || round > 0) cluster_barrier();
    mine = this_cluster().map_shared_rank(buffer, static_cast<int>((rank + 1) % kCluster))[(t + 1) % blockDim.x];
  }
  output[blockIdx.x * blockDim.x + t] = mine;
  if (kDefect != Defect::kNoLastBarrier) cluster_barrier();
}

template <Defect kDefect, unsigned kCluster = 4>
void rotation() {
  const Shape shape{.grid = 2 * kCluster, .block = 64, .shared = 128 * sizeof(float), .cluster = kCluster};
  const auto output = output_of<float>(2 * kCluster * 64, shape, rotate<kDefect, kCluster>);
  if (kDefect == Defect::kNone) require(output[0] == 4 % kCluster * 64.0f + 4.0f, "rotated");
}

constexpr Shape kTwoBlocks{.grid = 2, .block = 64, .shared = 128 * sizeof(float), .cluster = 2};

enum class Late { kNothing, kOwnWrite, kExit };

// What a thread does between its arrival and its wait is not released by the arrival.
template <Late kLate>
__global__ void arrive_then_wait(float* output) {
  SHARED_VALUES(float, values);
  const unsigned t = threadIdx.x;
  values[t] = 1.0f;
  this_cluster().barrier_arrive();
  output[blockIdx.x * blockDim.x + t] = values[t];
  if (kLate == Late::kOwnWrite) values[t] = 2.0f;
  this_cluster().barrier_wait();
  const int other = static_cast<int>(blockIdx.x ^ 1);
  output[blockIdx.x * blockDim.x + t] += this_cluster().map_shared_rank(values, other)[t];
  if (kLate == Late::kExit) return;
  this_cluster().barrier_arrive();
  output[blockIdx.x * blockDim.x + t] += 1.0f;
  this_cluster().barrier_wait();
}

template <Late kLate>
void split_barrier() {
  const auto output = output_of<float>(128, kTwoBlocks, arrive_then_wait<kLate>);
  if (kLate == Late::kNothing) require(output[127] == 3.0f, "summed");
}

// Block 0 writes after its arrival, and waits; block 1 arrives later for sure, by reads that order nothing.
__global__ void write_before_last_arrival(unsigned* written, float* output) {
  SHARED_VALUES(float, values);
  values[threadIdx.x] = 1.0f;
  if (blockIdx.x == 1) {
    while (*static_cast<volatile unsigned*>(written) < blockDim.x) __nanosleep(32);
  }
  this_cluster().barrier_arrive();
  if (blockIdx.x == 0) {
    values[threadIdx.x] = 2.0f;
    atomicAdd(written, 1);
  }
  this_cluster().barrier_wait();
  const int other = static_cast<int>(blockIdx.x ^ 1);
  output[blockIdx.x * blockDim.x + threadIdx.x] = this_cluster().map_shared_rank(values, other)[threadIdx.x];
  cluster_barrier();
}

void written_before_last_arrival() {
  Buffer<unsigned> written("written", 1, simt::Access::kReadWrite);
  output_of<float>(128, kTwoBlocks, write_before_last_arrival, written.data());
}

// Reads that precede the arrival at the last barrier are safe, later ones are not.
template <bool kCorrect>
__global__ void read_around_last_arrival(float* output) {
  SHARED_VALUES(float, values);
  values[threadIdx.x] = 1.0f;
  cluster_barrier();
  const float* const theirs = this_cluster().map_shared_rank(values, static_cast<int>(blockIdx.x ^ 1));
  float value = 0.0f;
  if (kCorrect) value = theirs[threadIdx.x];
  this_cluster().barrier_arrive();
  if (!kCorrect) value = theirs[threadIdx.x];
  this_cluster().barrier_wait();
  output[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

template <bool kCorrect>
void around_last_arrival() {
  output_of<float>(128, kTwoBlocks, read_around_last_arrival<kCorrect>);
}

// Block 0 has exited for sure when block 1 reads its memory.
__global__ void read_exited(unsigned* exits, float* output) {
  SHARED_VALUES(float, values);
  values[threadIdx.x] = 1.0f;
  cluster_barrier();
  if (blockIdx.x == 0) {
    bnext_add_acq_rel(exits, 1);
  } else {
    while (bnext_load_acquire(exits) < blockDim.x) __nanosleep(32);
    output[threadIdx.x] = this_cluster().map_shared_rank(values, 0)[threadIdx.x];
  }
}

void exited_block() {
  Buffer<unsigned> exits("exits", 1, simt::Access::kReadWrite);
  output_of<float>(64, kTwoBlocks, read_exited, exits.data());
}

__global__ void arrive_twice() {
  this_cluster().barrier_arrive();
  this_cluster().barrier_arrive();
}

__global__ void wait_only() { this_cluster().barrier_wait(); }

template <unsigned kRank>
__global__ void read_beyond(float* output) {
  SHARED_VALUES(float, values);
  values[threadIdx.x] = 1.0f;
  cluster_barrier();
  output[blockIdx.x * blockDim.x + threadIdx.x] = this_cluster().map_shared_rank(values, kRank)[threadIdx.x + 1];
  cluster_barrier();
}

template <unsigned kRank>
void beyond() {
  output_of<float>(64, {.grid = 2, .shared = 128, .cluster = 2}, read_beyond<kRank>);
}

// Half of the threads exit without a barrier; the cluster's barrier waits for the others alone.
__global__ void leave_early(float* output) {
  if (threadIdx.x >= 32) return;
  cluster_barrier();
  output[blockIdx.x * 32 + threadIdx.x] = 1.0f;
}

}  // namespace

std::vector<Case> cluster_cases() {
  return {
      {"cluster_exchange", nullptr, rotation<Defect::kNone>},
      {"cluster_of_three", nullptr, rotation<Defect::kNone, 3>},
      {"cluster_no_first_barrier", "before the first cluster barrier", rotation<Defect::kNoFirstBarrier>},
      {"cluster_no_last_barrier", "shared memory", rotation<Defect::kNoLastBarrier>},
      {"cluster_single_buffer", "data race on shared", rotation<Defect::kSingleBuffer>},
      {"cluster_split_barrier", nullptr, split_barrier<Late::kNothing>},
      {"cluster_write_after_arrival", "data race on shared", split_barrier<Late::kOwnWrite>},
      {"cluster_write_before_last_arrival", "data race on shared", written_before_last_arrival},
      {"cluster_exit_without_barrier", "shared memory", split_barrier<Late::kExit>},
      {"cluster_read_before_last_arrival", nullptr, around_last_arrival<true>},
      {"cluster_read_after_last_arrival", "shared memory", around_last_arrival<false>},
      {"cluster_read_exited", "use of the shared memory of an exited block", exited_block},
      {"cluster_arrive_twice", "barrier_arrive twice", [] { launch({.grid = 2, .cluster = 2}, arrive_twice); }},
      {"cluster_wait_only", "barrier_wait without", [] { launch({.grid = 2, .cluster = 2}, wait_only); }},
      {"cluster_read_beyond_end", "access outside any registered buffer", beyond<1>},
      {"cluster_rank_outside", "map_shared_rank of a rank outside", beyond<2>},
      {"cluster_early_exit", nullptr, [] { output_of<float>(64, kTwoBlocks, leave_early); }},
  };
}

}  // namespace selftest
