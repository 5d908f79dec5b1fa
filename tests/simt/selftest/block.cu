// Threads of a block: barriers, and what they order.
#include <cooperative_groups.h>

#include "case.h"

namespace selftest {
namespace {

using simt::Access;

enum class Missing { kNothing, kBarrierAfterWrite, kBarrierAfterRead };

// Each round, a thread reads what the next one wrote: from one buffer, so that two barriers a round are needed.
template <Missing kMissing>
__global__ void rotate(float* output, int rounds) {
  BNEXT_DYNAMIC_SHARED(raw);
  auto* const values = reinterpret_cast<float*>(raw);
  float mine = static_cast<float>(threadIdx.x);
  for (int round = 0; round < rounds; ++round) {
    values[threadIdx.x] = mine;
    if (kMissing != Missing::kBarrierAfterWrite) __syncthreads();
    mine = values[(threadIdx.x + 1) % blockDim.x];
    if (kMissing != Missing::kBarrierAfterRead) __syncthreads();
  }
  output[threadIdx.x] = mine;
}

template <Missing kMissing>
void rotation() {
  Buffer<float> output("output", 128, Access::kUninitialised);
  launch({.block = 128, .shared = 128 * sizeof(float)}, rotate<kMissing>, output.data(), 3);
  if (kMissing == Missing::kNothing) require(output[0] == 3.0f && output[127] == 2.0f, "rotated");
}

// From two buffers in turn: one barrier a round suffices.
__global__ void rotate_by_parity(float* output, int rounds) {
  BNEXT_DYNAMIC_SHARED(raw);
  auto* const values = reinterpret_cast<float*>(raw);
  float mine = static_cast<float>(threadIdx.x);
  for (int round = 0; round < rounds; ++round) {
    float* const buffer = values + (round % 2) * blockDim.x;
    buffer[threadIdx.x] = mine;
    cooperative_groups::this_thread_block().sync();
    mine = buffer[(threadIdx.x + 1) % blockDim.x];
  }
  output[threadIdx.x] = mine;
}

void rotation_by_parity() {
  Buffer<float> output("output", 128, Access::kUninitialised);
  launch({.grid = 2, .block = {16, 8}, .shared = 256 * sizeof(float)}, rotate_by_parity, output.data(), 0);
}

void rotation_by_parity_one_block() {
  Buffer<float> output("output", 128, Access::kUninitialised);
  launch({.block = 128, .shared = 256 * sizeof(float)}, rotate_by_parity, output.data(), 5);
  require(output[0] == 5.0f, "rotated");
  if (is_checked()) require(simt::take_counters().block_barriers == 5, "five barriers");
}

__global__ void count_predicates(int* output) {
  const int t = static_cast<int>(threadIdx.x);
  const int count = __syncthreads_count(t % 4 == 0);
  const int some = __syncthreads_or(t == 77);
  const int none = __syncthreads_or(0);
  const int all = __syncthreads_and(t >= 0);
  const int not_all = __syncthreads_and(t != 77);
  output[t] = count * 10000 + some * 1000 + none * 100 + all * 10 + not_all;
}

void predicates() {
  Buffer<int> output("output", 96, Access::kUninitialised);
  launch({.block = 96}, count_predicates, output.data());
  for (std::size_t i = 0; i < 96; ++i) require(output[i] == 24 * 10000 + 1000 + 10, "counted");
}

__global__ void exit_before_barrier(float* output, unsigned limit) {
  if (threadIdx.x >= limit) return;
  __syncthreads();
  output[threadIdx.x] = 1.0f;
}

void exit_before() {
  Buffer<float> output("output", 64, Access::kUninitialised);
  launch({.block = 64}, exit_before_barrier, output.data(), 40u);
}

// A barrier that one thread misses, and exits for sure before the others arrive or after they have.
template <bool kExitFirst>
__global__ void miss_barrier(unsigned* others) {
  const bool misses = threadIdx.x == 5;
  if (misses != kExitFirst) {
    while (bnext_load_acquire(others) < (kExitFirst ? 1u : blockDim.x - 1)) {
    }
  }
  if (misses == kExitFirst) bnext_add_release(others, 1);
  if (!misses) __syncthreads();
}

template <bool kExitFirst>
void missed_barrier() {
  Buffer<unsigned> others("others", 1, Access::kReadWrite);
  launch({.block = 64}, miss_barrier<kExitFirst>, others.data());
}

__global__ void wait_in_two_places(float* output) {
  if (threadIdx.x < 32) {
    output[threadIdx.x] = 1.0f;
    __syncthreads();
    output[threadIdx.x] += 1.0f;
  } else {
    __syncthreads();
    output[threadIdx.x] = 3.0f;
  }
}

void two_places() {
  Buffer<float> output("output", 64, Access::kUninitialised);
  launch({.block = 64}, wait_in_two_places, output.data());
}

__global__ void wait_for_different_things() {
  if (threadIdx.x == 3) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// All read one value, then one thread overwrites it.
template <bool kCorrect>
__global__ void read_then_overwrite(float* output) {
  BNEXT_DYNAMIC_SHARED(raw);
  auto* const value = reinterpret_cast<float*>(raw);
  if (threadIdx.x == 0) *value = 1.0f;
  __syncthreads();
  output[threadIdx.x] = *value;
  if (kCorrect) __syncthreads();
  if (threadIdx.x == blockDim.x / 2) *value = 2.0f;
}

template <bool kCorrect>
void overwrite() {
  Buffer<float> output("output", 256, Access::kUninitialised);
  launch({.block = 256, .shared = 4}, read_then_overwrite<kCorrect>, output.data());
}

__global__ void find_index(unsigned* output) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  output[block * blockDim.x * blockDim.y * blockDim.z + thread] = 1 + threadIdx.z + blockIdx.z;
}

void three_dimensions() {
  Buffer<unsigned> output("output", 24 * 24, Access::kUninitialised);
  launch({.grid = {2, 3, 4}, .block = {4, 3, 2}}, find_index, output.data());
  require(output[0] == 1 && output[24 * 24 - 1] == 5, "numbered");
}

}  // namespace

std::vector<Case> block_cases() {
  return {
      {"rotation", nullptr, rotation<Missing::kNothing>},
      {"rotation_no_barrier_after_write", "data race on shared", rotation<Missing::kBarrierAfterWrite>},
      {"rotation_no_barrier_after_read", "data race on shared", rotation<Missing::kBarrierAfterRead>},
      {"rotation_by_parity", nullptr, rotation_by_parity_one_block},
      {"blocks_write_the_same", "data race on global buffer 'output'", rotation_by_parity},
      {"syncthreads_predicates", nullptr, predicates},
      {"exit_before_barrier", "divergent barrier", exit_before},
      {"exit_then_barrier", "__syncthreads after other threads of the block have exited", missed_barrier<true>},
      {"barrier_then_exit", "a thread exits while others wait in __syncthreads", missed_barrier<false>},
      {"barriers_in_two_places", "divergent barrier: others of the block wait in __syncthreads at", two_places},
      {"wait_for_different_things", "divergent barrier, deadlock",
       [] { launch({.block = 64}, wait_for_different_things); }},
      {"read_barrier_overwrite", nullptr, overwrite<true>},
      {"read_overwrite", "data race on shared+0 of 4", overwrite<false>},
      {"three_dimensions", nullptr, three_dimensions},
  };
}

}  // namespace selftest
