// Threads of a block: barriers, and what they order.
#include "case.h"

namespace selftest {
namespace {

enum class Missing { kNothing, kBarrierAfterWrite, kBarrierAfterRead };

// Each round, a thread reads what the next one wrote. With one buffer for all rounds, two barriers a round are needed.
template <Missing kMissing>
__global__ void rotate(float* output) {
  SHARED_VALUES(float, values);
  float mine = static_cast<float>(threadIdx.x);
  for (int round = 0; round < 3; ++round) {
    values[threadIdx.x] = mine;
    if (kMissing != Missing::kBarrierAfterWrite) __syncthreads();
    mine = values[(threadIdx.x + 1) % blockDim.x];
    if (kMissing != Missing::kBarrierAfterRead) __syncthreads();
  }
  output[threadIdx.x] = mine;
}

template <Missing kMissing>
void rotation() {
  const auto output = output_of<float>(128, {.block = 128, .shared = 128 * sizeof(float)}, rotate<kMissing>);
  if (kMissing == Missing::kNothing) require(output[0] == 3.0f && output[127] == 2.0f, "rotated");
}

// The same with two buffers in turn: one barrier a round suffices.
__global__ void rotate_by_parity(float* output) {
  SHARED_VALUES(float, values);
  float mine = static_cast<float>(threadIdx.x);
  for (unsigned round = 0; round < 5; ++round) {
    float* const buffer = values + round % 2 * blockDim.x;
    buffer[threadIdx.x] = mine;
    __syncthreads();
    mine = buffer[(threadIdx.x + 1) % blockDim.x];
  }
  output[threadIdx.x] = mine;
}

template <unsigned kGrid>
void rotation_by_parity() {
  const auto output =
      output_of<float>(128, {.grid = kGrid, .block = 128, .shared = 256 * sizeof(float)}, rotate_by_parity);
  require(output[0] == 5.0f, "rotated");
}

__global__ void reduce_predicates(int* output) {
  const int some = __syncthreads_or(threadIdx.x == 77);
  const int none = __syncthreads_or(0);
  output[threadIdx.x] = some * 10 + none;
}

void predicates() {
  for (const int result : output_of<int>(96, {.block = 96}, reduce_predicates)) require(result == 10, "reduced");
}

__global__ void exit_before_barrier(float* output) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  output[threadIdx.x] = 1.0f;
}

// A barrier that one thread misses, and exits for sure before the others arrive or after they have.
template <bool kExitFirst>
__global__ void miss_barrier(unsigned* others) {
  const bool misses = threadIdx.x == 5;
  if (misses != kExitFirst) {
    while (bnext_load_acquire(others) < (kExitFirst ? 1u : blockDim.x - 1)) {
    }
  }
  if (misses == kExitFirst) bnext_add_acq_rel(others, 1);
  if (!misses) __syncthreads();
}

template <bool kExitFirst>
void missed_barrier() {
  Buffer<unsigned> others("others", 1, simt::Access::kReadWrite);
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

__global__ void wait_for_different_things() {
  if (threadIdx.x == 3) {
    __ballot_sync(0xffffffffu, 1);
  } else {
    __syncthreads();
  }
}

// All read one value, then one thread overwrites it.
template <bool kCorrect>
__global__ void read_then_overwrite(float* output) {
  SHARED_VALUES(float, value);
  if (threadIdx.x == 0) *value = 1.0f;
  __syncthreads();
  output[threadIdx.x] = *value;
  if (kCorrect) __syncthreads();
  if (threadIdx.x == blockDim.x / 2) *value = 2.0f;
}

template <bool kCorrect>
void overwrite() {
  output_of<float>(256, {.block = 256, .shared = 4}, read_then_overwrite<kCorrect>);
}

}  // namespace

std::vector<Case> block_cases() {
  return {
      {"rotation", nullptr, rotation<Missing::kNothing>},
      {"rotation_no_barrier_after_write", "data race on shared", rotation<Missing::kBarrierAfterWrite>},
      {"rotation_no_barrier_after_read", "data race on shared", rotation<Missing::kBarrierAfterRead>},
      {"rotation_by_parity", nullptr, rotation_by_parity<1>},
      {"blocks_write_the_same", "data race on global buffer 'output'", rotation_by_parity<2>},
      {"syncthreads_or", nullptr, predicates},
      {"exit_before_barrier", "divergent barrier", [] { output_of<float>(64, {.block = 64}, exit_before_barrier); }},
      {"exit_then_barrier", "__syncthreads after other threads of the block have exited", missed_barrier<true>},
      {"barrier_then_exit", "a thread exits while others wait in __syncthreads", missed_barrier<false>},
      {"barriers_in_two_places", "divergent barrier: others of the block wait in __syncthreads at",
       [] { output_of<float>(64, {.block = 64}, wait_in_two_places); }},
      {"wait_for_different_things", "divergent barrier, deadlock",
       [] { launch({.block = 64}, wait_for_different_things); }},
      {"read_barrier_overwrite", nullptr, overwrite<true>},
      {"read_overwrite", "data race on shared+0 of 4", overwrite<false>},
  };
}

}  // namespace selftest
