// Blocks of a cluster: one another's shared memory.
#include <cooperative_groups.h>

#include "case.h"

namespace selftest {
namespace {

namespace cg = cooperative_groups;
using simt::Access;

enum class Defect { kNone, kNoFirstBarrier, kNoLastBarrier, kSingleBuffer };

// Each round, a thread reads what a neighbour in the next block wrote, through two buffers in turn.
template <Defect kDefect>
__global__ void rotate(float* output, int rounds) {
  BNEXT_DYNAMIC_SHARED(raw);
  auto* const values = reinterpret_cast<float*>(raw);
  const auto cluster = cg::this_cluster();
  const unsigned next = (cluster.block_rank() + 1) % cluster.num_blocks();
  const unsigned t = threadIdx.x;
  float mine = static_cast<float>(cluster.thread_rank());
  for (int round = 0; round < rounds; ++round) {
    float* const buffer = values + (kDefect == Defect::kSingleBuffer ? 0 : round % 2) * blockDim.x;
    buffer[t] = mine;
    if (kDefect != Defect::kNoFirstBarrier || round > 0) cluster.sync();
    mine = cluster.map_shared_rank(buffer, static_cast<int>(next))[(t + 1) % blockDim.x];
  }
  output[blockIdx.x * blockDim.x + t] = mine;
  if (kDefect != Defect::kNoLastBarrier) cluster.sync();
}

template <Defect kDefect>
void rotation() {
  Buffer<float> output("output", 8 * 64, Access::kUninitialised);
  launch({.grid = 8, .block = 64, .shared = 128 * sizeof(float), .cluster = 4}, rotate<kDefect>, output.data(), 4);
  if (kDefect == Defect::kNone) require(output[0] == 4.0f && output[7 * 64] == 3 * 64 + 4.0f, "rotated");
}

enum class Late { kNothing, kOwnWrite, kExit };

// What a thread does between its arrival and its wait is not released by the arrival.
template <Late kLate>
__global__ void arrive_then_wait(float* output) {
  BNEXT_DYNAMIC_SHARED(raw);
  auto* const values = reinterpret_cast<float*>(raw);
  const auto cluster = cg::this_cluster();
  const unsigned t = threadIdx.x;
  values[t] = 1.0f;
  values[t + blockDim.x] = 1.0f;
  cluster.barrier_arrive();
  output[blockIdx.x * blockDim.x + t] = values[t];
  if (kLate == Late::kOwnWrite) values[t] = 2.0f;
  cluster.barrier_wait();
  const int other = static_cast<int>(cluster.block_rank() ^ 1);
  output[blockIdx.x * blockDim.x + t] += cluster.map_shared_rank(values, other)[t];
  if (kLate == Late::kExit) return;
  cluster.barrier_arrive();
  output[blockIdx.x * blockDim.x + t] += 1.0f;
  cluster.barrier_wait();
}

template <Late kLate>
void split_barrier() {
  Buffer<float> output("output", 128, Access::kUninitialised);
  launch({.grid = 2, .block = 64, .shared = 128 * sizeof(float), .cluster = 2}, arrive_then_wait<kLate>, output.data());
  if (kLate == Late::kNothing) require(output[127] == 3.0f, "summed");
}

// Reads that precede the arrival at the last barrier are safe, later ones are not.
template <bool kCorrect>
__global__ void read_around_last_arrival(float* output) {
  BNEXT_DYNAMIC_SHARED(raw);
  auto* const values = reinterpret_cast<float*>(raw);
  const auto cluster = cg::this_cluster();
  values[threadIdx.x] = 1.0f;
  cluster.sync();
  const float* const theirs = cluster.map_shared_rank(values, static_cast<int>(cluster.block_rank() ^ 1));
  float value = 0.0f;
  if (kCorrect) value = theirs[threadIdx.x];
  cluster.barrier_arrive();
  if (!kCorrect) value = theirs[threadIdx.x];
  cluster.barrier_wait();
  output[blockIdx.x * blockDim.x + threadIdx.x] = value;
}

template <bool kCorrect>
void around_last_arrival() {
  Buffer<float> output("output", 64, Access::kUninitialised);
  launch({.grid = 2, .shared = 128, .cluster = 2}, read_around_last_arrival<kCorrect>, output.data());
}

// Block 0 has exited for sure when block 1 reads its memory.
__global__ void read_exited(unsigned* exits, float* output) {
  BNEXT_DYNAMIC_SHARED(raw);
  auto* const values = reinterpret_cast<float*>(raw);
  values[threadIdx.x] = 1.0f;
  cg::this_cluster().sync();
  if (cg::this_cluster().block_rank() == 0) {
    bnext_add_release(exits, 1);
  } else {
    while (bnext_load_acquire(exits) < blockDim.x) __nanosleep(32);
    output[threadIdx.x] = cg::this_cluster().map_shared_rank(values, 0)[threadIdx.x];
  }
}

void exited_block() {
  Buffer<unsigned> exits("exits", 1, Access::kReadWrite);
  Buffer<float> output("output", 32, Access::kUninitialised);
  launch({.grid = 2, .shared = 128, .cluster = 2}, read_exited, exits.data(), output.data());
}

__global__ void arrive_twice() {
  cg::this_cluster().barrier_arrive();
  cg::this_cluster().barrier_arrive();
}

__global__ void wait_only() { cg::this_cluster().barrier_wait(); }

template <unsigned kRank>
__global__ void read_beyond(float* output) {
  BNEXT_DYNAMIC_SHARED(raw);
  auto* const values = reinterpret_cast<float*>(raw);
  values[threadIdx.x] = 1.0f;
  cg::this_cluster().sync();
  output[blockIdx.x * blockDim.x + threadIdx.x] = cg::this_cluster().map_shared_rank(values, kRank)[threadIdx.x + 1];
  cg::this_cluster().sync();
}

template <unsigned kRank>
void beyond() {
  Buffer<float> output("output", 64, Access::kUninitialised);
  launch({.grid = 2, .shared = 128, .cluster = 2}, read_beyond<kRank>, output.data());
}

// Without the attribute a launch has clusters of one block.
__global__ void find_rank(unsigned* output) {
  if (threadIdx.x == 0) output[blockIdx.x] = cg::this_cluster().block_rank() * 100 + cg::this_cluster().num_blocks();
  cg::this_cluster().sync();
}

template <unsigned kCluster>
void ranks() {
  Buffer<unsigned> output("output", 6, Access::kUninitialised);
  launch({.grid = 6, .cluster = kCluster}, find_rank, output.data());
  for (unsigned i = 0; i < 6; ++i) require(output[i] == i % kCluster * 100 + kCluster, "rank");
}

// A block may keep threads that take no part in what follows, but for the barrier.
__global__ void leave_early(float* output) {
  if (threadIdx.x >= 32) return;
  cg::this_cluster().sync();
  output[blockIdx.x * 32 + threadIdx.x] = 1.0f;
}

void early_exit() {
  Buffer<float> output("output", 64, Access::kUninitialised);
  launch({.grid = 2, .block = 64, .cluster = 2}, leave_early, output.data());
}

}  // namespace

std::vector<Case> cluster_cases() {
  return {
      {"cluster_exchange", nullptr, rotation<Defect::kNone>},
      {"cluster_no_first_barrier", "before the first cluster barrier", rotation<Defect::kNoFirstBarrier>},
      {"cluster_no_last_barrier", "shared memory", rotation<Defect::kNoLastBarrier>},
      {"cluster_single_buffer", "data race on shared", rotation<Defect::kSingleBuffer>},
      {"cluster_split_barrier", nullptr, split_barrier<Late::kNothing>},
      {"cluster_write_after_arrival", "data race on shared", split_barrier<Late::kOwnWrite>},
      {"cluster_exit_without_barrier", "shared memory", split_barrier<Late::kExit>},
      {"cluster_read_before_last_arrival", nullptr, around_last_arrival<true>},
      {"cluster_read_after_last_arrival", "shared memory", around_last_arrival<false>},
      {"cluster_read_exited", "use of the shared memory of an exited block", exited_block},
      {"cluster_arrive_twice", "barrier_arrive twice", [] { launch({.grid = 2, .cluster = 2}, arrive_twice); }},
      {"cluster_wait_only", "barrier_wait without", [] { launch({.grid = 2, .cluster = 2}, wait_only); }},
      {"cluster_read_beyond_end", "access outside any registered buffer", beyond<1>},
      {"cluster_rank_outside", "map_shared_rank of a rank outside", beyond<2>},
      {"cluster_ranks", nullptr, ranks<3>},
      {"cluster_of_one", nullptr, ranks<1>},
      {"cluster_early_exit", nullptr, early_exit},
  };
}

}  // namespace selftest
