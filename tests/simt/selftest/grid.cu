// Blocks of a grid: counters they wait at, by release and acquire.
#include "case.h"

namespace selftest {
namespace {

using simt::Access;

enum class Defect { kNone, kRelaxedLoad, kRelaxedAdd, kNoBarrierBefore, kNoBarrierAfter, kSingleBuffer };

template <Defect kDefect>
__device__ void counter_barrier(unsigned* counter, unsigned target) {
  if (kDefect != Defect::kNoBarrierBefore) __syncthreads();
  if (threadIdx.x == 0) {
    if (kDefect == Defect::kRelaxedAdd) {
      atomicAdd(counter, 1u);
    } else {
      bnext_add_acq_rel(counter, 1u);
    }
    if (kDefect == Defect::kRelaxedLoad) {
      while (*static_cast<volatile unsigned*>(counter) < target) __nanosleep(32);
    } else {
      while (bnext_load_acquire(counter) < target) __nanosleep(32);
    }
  }
  if (kDefect != Defect::kNoBarrierAfter) __syncthreads();
}

// Each round, every thread reads what its neighbour in the next block wrote, through two buffers in turn.
template <Defect kDefect>
__global__ void rotate(unsigned* counter, float* scratch, float* output) {
  const unsigned size = gridDim.x * blockDim.x;
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  float mine = static_cast<float>(i);
  for (unsigned round = 0; round < 4; ++round) {
    float* const buffer = scratch + (kDefect == Defect::kSingleBuffer ? 0 : round % 2) * size;
    buffer[i] = mine;
    counter_barrier<kDefect>(counter, (round + 1) * gridDim.x);
    // The neighbour has another number in its block, so that a missing barrier within a block shows, too.
    mine = buffer[(i + blockDim.x + 1) % size];
  }
  output[i] = mine;
}

template <Defect kDefect>
void rotation() {
  Buffer<unsigned> counter("counter", 1, Access::kReadWrite);
  Buffer<float> scratch("scratch", 512, Access::kUninitialised);
  const Shape shape{.grid = 4, .block = 64, .cooperative = true};
  const auto output = output_of<float>(256, shape, rotate<kDefect>, counter.data(), scratch.data());
  if (kDefect == Defect::kNone) require(output[0] == 4.0f && output[255] == 3.0f, "rotated");
}

// The last block to finish adds up what all wrote; blocks need not run at once. One addition releases what a block has
// written, and acquires what the earlier ones have.
template <bool kOrders>
__global__ void sum_in_last_block(unsigned* counter, float* partial, float* output) {
  partial[blockIdx.x] = 1.0f;
  const unsigned before = kOrders ? bnext_add_acq_rel(counter, 1) : atomicAdd(counter, 1);
  if (before != gridDim.x - 1) return;
  float sum = 0.0f;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i];
  *output = sum;
}

template <bool kOrders>
void last_block() {
  Buffer<unsigned> counter("counter", 1, Access::kReadWrite);
  Buffer<float> partial("partial", 100, Access::kUninitialised);
  const auto output =
      output_of<float>(1, {.grid = 100, .block = 1}, sum_in_last_block<kOrders>, counter.data(), partial.data());
  require(output[0] == 100.0f && counter[0] == 100, "summed");
}

// Block 0 hands a value to block 1.
template <bool kWriteFirst>
__global__ void hand_over(unsigned* flag, float* value, float* output) {
  if (blockIdx.x == 0) {
    if (kWriteFirst) *value = 3.0f;
    bnext_add_acq_rel(flag, 1);
    if (!kWriteFirst) *value = 3.0f;
    atomicAdd(flag, 1);  // which releases nothing of its own
  } else {
    while (bnext_load_acquire(flag) != 2) __nanosleep(32);
    *output = *value;
  }
}

template <bool kWriteFirst>
void handed_over() {
  Buffer<unsigned> flag("flag", 1, Access::kReadWrite);
  Buffer<float> value("value", 1, Access::kUninitialised);
  const Shape shape{.grid = 2, .block = 1, .cooperative = true};
  require(output_of<float>(1, shape, hand_over<kWriteFirst>, flag.data(), value.data())[0] == 3.0f, "handed over");
}

// Each block waits for all others, which only a cooperative launch must run at once.
__global__ void wait_for_all(unsigned* counter, unsigned target) {
  if (threadIdx.x != 0) return;
  bnext_add_acq_rel(counter, 1u);
  while (bnext_load_acquire(counter) < target) __nanosleep(32);
}

template <unsigned kGrid, unsigned kTarget, bool kCooperative>
void bare_spin() {
  Buffer<unsigned> counter("counter", 1, Access::kReadWrite);
  launch({.grid = kGrid, .block = 512, .cooperative = kCooperative}, wait_for_all, counter.data(), kTarget);
}

__global__ void read_while_adding(unsigned* counter, unsigned* output) {
  if (blockIdx.x == 0) atomicAdd(counter, 1u);
  if (blockIdx.x == 1) output[threadIdx.x] = *counter;
}

void plain_and_atomic() {
  Buffer<unsigned> counter("counter", 1, Access::kReadWrite);
  output_of<unsigned>(32, {.grid = 2}, read_while_adding, counter.data());
}

}  // namespace

std::vector<Case> grid_cases() {
  constexpr const char* kRace = "data race on global buffer 'scratch'";
  constexpr const char* kPartial = "data race on global buffer 'partial'";
  return {
      {"counter_barrier", nullptr, rotation<Defect::kNone>},
      {"counter_barrier_relaxed_load", kRace, rotation<Defect::kRelaxedLoad>},
      {"counter_barrier_relaxed_add", kRace, rotation<Defect::kRelaxedAdd>},
      {"counter_barrier_no_barrier_before", kRace, rotation<Defect::kNoBarrierBefore>},
      {"counter_barrier_no_barrier_after", "", rotation<Defect::kNoBarrierAfter>},
      {"counter_barrier_single_buffer", kRace, rotation<Defect::kSingleBuffer>},
      {"last_block", nullptr, last_block<true>},
      {"last_block_relaxed", kPartial, last_block<false>},
      {"flag", nullptr, handed_over<true>},
      {"flag_write_after_release", "data race on global buffer 'value'", handed_over<false>},
      {"spin_for_nobody", "deadlock", bare_spin<1, 1000, true>},
      {"bare_spin_cooperative", nullptr, bare_spin<8, 8, true>},
      {"bare_spin", "deadlock", bare_spin<100, 100, false>},
      {"plain_and_atomic", "data race on global buffer 'counter'", plain_and_atomic},
  };
}

}  // namespace selftest
