// Blocks of a grid: fences and atomics, counters they wait at, grid barriers.
#include <cooperative_groups.h>

#include "case.h"

namespace selftest {
namespace {

using simt::Access;

enum class Defect {
  kNone,
  kNoBarrierBefore,
  kNoFenceBefore,
  kNoFenceAfter,
  kNoBarrierAfter,
  kBlockFenceBefore,
  kBlockFenceAfter,
  kSingleBuffer,
};

template <Defect kDefect>
__device__ void counter_barrier(unsigned* counter, unsigned target) {
  if (kDefect != Defect::kNoBarrierBefore) __syncthreads();
  if (threadIdx.x == 0) {
    if (kDefect == Defect::kBlockFenceBefore) {
      __threadfence_block();
    } else if (kDefect != Defect::kNoFenceBefore) {
      __threadfence();
    }
    atomicAdd(counter, 1u);
    while (*static_cast<volatile unsigned*>(counter) < target) __nanosleep(32);
    if (kDefect == Defect::kBlockFenceAfter) {
      __threadfence_block();
    } else if (kDefect != Defect::kNoFenceAfter) {
      __threadfence();
    }
  }
  if (kDefect != Defect::kNoBarrierAfter) __syncthreads();
}

enum class Wait { kAcquire, kRelaxedLoad, kRelaxedAdd, kNoBarrierBefore, kNoBarrierAfter };

template <Wait kWait>
__device__ void acquire_release_barrier(unsigned* counter, unsigned target) {
  if (kWait != Wait::kNoBarrierBefore) __syncthreads();
  if (threadIdx.x == 0) {
    if (kWait == Wait::kRelaxedAdd) {
      atomicAdd(counter, 1u);
    } else {
      bnext_add_release(counter, 1u);
    }
    if (kWait == Wait::kRelaxedLoad) {
      while (*static_cast<volatile unsigned*>(counter) < target) __nanosleep(32);
    } else {
      while (bnext_load_acquire(counter) < target) __nanosleep(32);
    }
  }
  if (kWait != Wait::kNoBarrierAfter) __syncthreads();
}

// Each round, every thread reads what its neighbour in the next block wrote, through two buffers in turn.
template <typename Barrier>
__device__ void rotate(float* scratch, float* output, int rounds, int buffers, Barrier barrier) {
  const unsigned size = gridDim.x * blockDim.x;
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  float mine = static_cast<float>(i);
  for (int round = 0; round < rounds; ++round) {
    float* const buffer = scratch + static_cast<unsigned>(round % buffers) * size;
    buffer[i] = mine;
    barrier(static_cast<unsigned>(round + 1) * gridDim.x);
    // Not the same thread's: a missing barrier within the block must show too.
    mine = buffer[(i + blockDim.x + 1) % size];
  }
  output[i] = mine;
}

template <Defect kDefect>
__global__ void rotate_counter(unsigned* counter, float* scratch, float* output) {
  rotate(scratch, output, 4, kDefect == Defect::kSingleBuffer ? 1 : 2,
         [&](unsigned target) { counter_barrier<kDefect>(counter, target); });
}

template <Wait kWait>
__global__ void rotate_acquire(unsigned* counter, float* scratch, float* output) {
  rotate(scratch, output, 4, 2, [&](unsigned target) { acquire_release_barrier<kWait>(counter, target); });
}

template <bool kCorrect>
__global__ void rotate_grid_sync(unsigned*, float* scratch, float* output) {
  rotate(scratch, output, 4, 2, [&](unsigned) {
    if (kCorrect) cooperative_groups::this_grid().sync();
  });
}

constexpr unsigned kGrid = 4;
constexpr unsigned kBlock = 64;

void run_rotation(void (*kernel)(unsigned*, float*, float*), bool correct) {
  Buffer<unsigned> counter("counter", 1, Access::kReadWrite);
  Buffer<float> scratch("scratch", 2 * kGrid * kBlock, Access::kUninitialised);
  Buffer<float> output("output", kGrid * kBlock, Access::kUninitialised);
  launch({.grid = kGrid, .block = kBlock, .cooperative = true}, kernel, counter.data(), scratch.data(), output.data());
  if (correct) require(output[0] == 4.0f && output[kGrid * kBlock - 1] == 3.0f, "rotated");
}

template <Defect kDefect>
void counter_rotation() {
  run_rotation(rotate_counter<kDefect>, kDefect == Defect::kNone);
}

template <Wait kWait>
void acquire_rotation() {
  run_rotation(rotate_acquire<kWait>, kWait == Wait::kAcquire);
}

template <bool kCorrect>
void grid_rotation() {
  run_rotation(rotate_grid_sync<kCorrect>, kCorrect);
}

// The last block to finish adds up what all wrote; blocks need not run at once.
template <bool kFenceBefore, bool kFenceAfter>
__global__ void sum_in_last_block(unsigned* counter, float* partial, float* output) {
  BNEXT_DYNAMIC_SHARED(raw);
  auto* const is_last = reinterpret_cast<bool*>(raw);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = 1.0f;
    if (kFenceBefore) __threadfence();
    *is_last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
    if (kFenceAfter) __threadfence();
  }
  __syncthreads();
  if (*is_last && threadIdx.x == 1) {
    float sum = 0.0f;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i];
    *output = sum;
  }
}

template <bool kFenceBefore, bool kFenceAfter>
void last_block() {
  Buffer<unsigned> counter("counter", 1, Access::kReadWrite);
  Buffer<float> partial("partial", 100, Access::kUninitialised);
  Buffer<float> output("output", 1, Access::kUninitialised);
  launch({.grid = 100, .shared = 1}, sum_in_last_block<kFenceBefore, kFenceAfter>, counter.data(), partial.data(),
         output.data());
  if (kFenceBefore && kFenceAfter) require(output[0] == 100.0f && counter[0] == 0, "summed");
}

template <bool kFences>
__global__ void add_under_lock(unsigned* lock, float* sum) {
  if (threadIdx.x != 0) return;
  while (atomicCAS(lock, 0u, 1u) != 0u) {
  }
  if (kFences) __threadfence();
  *sum += 1.0f;
  if (kFences) __threadfence();
  atomicExch(lock, 0u);
}

template <bool kFences>
void under_lock() {
  Buffer<unsigned> lock("lock", 1, Access::kReadWrite);
  Buffer<float> sum("sum", 1, Access::kReadWrite);
  launch({.grid = 20}, add_under_lock<kFences>, lock.data(), sum.data());
  require(sum[0] == 20.0f, "added");
}

// One warp hands a value to another through a flag in shared memory.
template <bool kFences>
__global__ void hand_over_in_block(float* output) {
  BNEXT_DYNAMIC_SHARED(raw);
  auto* const value = reinterpret_cast<float*>(raw);
  auto* const flag = reinterpret_cast<volatile int*>(raw + 4);
  if (threadIdx.x == 0) *flag = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    *value = 3.0f;
    if (kFences) __threadfence_block();
    *flag = 1;
  }
  if (threadIdx.x == 32) {
    while (*flag == 0) {
    }
    if (kFences) __threadfence_block();
    *output = *value;
  }
}

template <bool kFences>
void handing_over() {
  Buffer<float> output("output", 1, Access::kUninitialised);
  launch({.block = 64, .shared = 8}, hand_over_in_block<kFences>, output.data());
}

enum class Relay { kNone, kWriteAfterFence, kOverwriteFlag, kAddToFlag };

// Block 0 hands a value to block 1, and block 2 changes the flag before block 1 first reads it.
template <Relay kRelay>
__global__ void hand_over(int* flags, float* value, float* output) {
  volatile int* const flag = flags;
  volatile int* const is_relayed = flags + 1;
  if (blockIdx.x == 0) {
    if (kRelay != Relay::kWriteAfterFence) *value = 3.0f;
    __threadfence();
    if (kRelay == Relay::kWriteAfterFence) *value = 3.0f;
    *flag = 1;
  }
  if (blockIdx.x == 2) {
    while (*flag != 1) __nanosleep(32);
    // An addition continues what was released at the flag, a plain store ends it.
    if (kRelay == Relay::kAddToFlag) atomicAdd(flags, 1);
    if (kRelay == Relay::kOverwriteFlag) *flag = 2;
    *is_relayed = 1;
  }
  if (blockIdx.x == 1) {
    while (*is_relayed == 0) __nanosleep(32);
    const bool is_set = *flag != 0;
    __threadfence();
    if (is_set) *output = *value;
  }
}

template <Relay kRelay>
void relay() {
  Buffer<int> flags("flags", 2, Access::kReadWrite);
  Buffer<float> value("value", 1, Access::kUninitialised);
  Buffer<float> output("output", 1, Access::kUninitialised);
  launch({.grid = 3, .block = 1, .cooperative = true}, hand_over<kRelay>, flags.data(), value.data(), output.data());
  require(output[0] == 3.0f, "handed over");
}

__global__ void wait_for_nobody(unsigned* counter) {
  while (*static_cast<volatile unsigned*>(counter) < 1000u) __nanosleep(32);
}

void spin_for_nobody() {
  Buffer<unsigned> counter("counter", 1, Access::kReadWrite);
  launch({}, wait_for_nobody, counter.data());
}

// Waits for blocks that a launch which is not cooperative need not run.
__global__ void wait_for_all(unsigned* counter) {
  if (threadIdx.x != 0) return;
  bnext_add_release(counter, 1u);
  while (bnext_load_acquire(counter) < gridDim.x) __nanosleep(32);
}

template <bool kCooperative>
void bare_spin() {
  Buffer<unsigned> counter("counter", 1, Access::kReadWrite);
  launch({.grid = kCooperative ? 8u : 100u, .block = 512, .cooperative = kCooperative}, wait_for_all, counter.data());
}

__global__ void sync_grid() { cooperative_groups::this_grid().sync(); }

// One thread exits for sure before the others arrive, or while they wait.
template <bool kExitFirst>
__global__ void miss_grid_sync(unsigned* others) {
  const bool misses = blockIdx.x == 2 && threadIdx.x == 0;
  if (misses != kExitFirst) {
    while (bnext_load_acquire(others) < (kExitFirst ? 1u : gridDim.x * blockDim.x - 1)) {
    }
  }
  if (misses == kExitFirst) bnext_add_release(others, 1);
  if (!misses) cooperative_groups::this_grid().sync();
}

template <bool kExitFirst>
void missed_grid_sync() {
  Buffer<unsigned> others("others", 1, Access::kReadWrite);
  launch({.grid = 4, .cooperative = true}, miss_grid_sync<kExitFirst>, others.data());
}

__global__ void read_while_adding(unsigned* counter, unsigned* output) {
  if (blockIdx.x == 0) atomicAdd(counter, 1u);
  if (blockIdx.x == 1) output[threadIdx.x] = *counter;
}

void plain_and_atomic() {
  Buffer<unsigned> counter("counter", 1, Access::kReadWrite);
  Buffer<unsigned> output("output", 32, Access::kUninitialised);
  launch({.grid = 2}, read_while_adding, counter.data(), output.data());
}

struct Cells {
  int* ints;
  unsigned* unsigneds;
  unsigned long long* longs;
  float* floats;
  double* doubles;
};

__global__ void use_atomics(Cells cells) {
  const int t = static_cast<int>(threadIdx.x);
  atomicAdd(cells.ints, t);
  atomicMax(cells.ints + 1, t);
  atomicExch(cells.ints + 2, 7);
  atomicAdd(cells.unsigneds, 2u);
  atomicInc(cells.unsigneds + 1, 9u);
  atomicMax(cells.unsigneds + 2, static_cast<unsigned>(t));
  atomicAdd(cells.longs, 1ull << 40);
  atomicMax(cells.longs + 1, static_cast<unsigned long long>(t));
  atomicCAS(cells.longs + 2, 0ull, 5ull);
  atomicAdd(cells.floats, 0.5f);
  atomicAdd(cells.doubles, 0.25);
}

void atomics() {
  Buffer<int> ints("ints", 3, Access::kReadWrite);
  Buffer<unsigned> unsigneds("unsigneds", 3, Access::kReadWrite);
  Buffer<unsigned long long> longs("longs", 3, Access::kReadWrite);
  Buffer<float> floats("floats", 1, Access::kReadWrite);
  Buffer<double> doubles("doubles", 1, Access::kReadWrite);
  launch({.grid = 2}, use_atomics, Cells{ints.data(), unsigneds.data(), longs.data(), floats.data(), doubles.data()});
  require(ints[0] == 992 && ints[1] == 31 && ints[2] == 7, "ints");
  require(unsigneds[0] == 128 && unsigneds[1] == 4 && unsigneds[2] == 31, "unsigneds");
  require(longs[0] == 64ull << 40 && longs[1] == 31 && longs[2] == 5, "longs");
  require(floats[0] == 32.0f && doubles[0] == 16.0, "floating point");
}

}  // namespace

std::vector<Case> grid_cases() {
  constexpr const char* kRace = "data race on global buffer 'scratch'";
  return {
      {"counter_barrier", nullptr, counter_rotation<Defect::kNone>},
      {"counter_barrier_no_barrier_before", kRace, counter_rotation<Defect::kNoBarrierBefore>},
      {"counter_barrier_no_fence_before", kRace, counter_rotation<Defect::kNoFenceBefore>},
      {"counter_barrier_no_fence_after", kRace, counter_rotation<Defect::kNoFenceAfter>},
      {"counter_barrier_no_barrier_after", "", counter_rotation<Defect::kNoBarrierAfter>},
      {"counter_barrier_block_fence_before", kRace, counter_rotation<Defect::kBlockFenceBefore>},
      {"counter_barrier_block_fence_after", kRace, counter_rotation<Defect::kBlockFenceAfter>},
      {"counter_barrier_single_buffer", kRace, counter_rotation<Defect::kSingleBuffer>},
      {"acquire_barrier", nullptr, acquire_rotation<Wait::kAcquire>},
      {"acquire_barrier_relaxed_load", kRace, acquire_rotation<Wait::kRelaxedLoad>},
      {"acquire_barrier_relaxed_add", kRace, acquire_rotation<Wait::kRelaxedAdd>},
      {"acquire_barrier_no_barrier_before", kRace, acquire_rotation<Wait::kNoBarrierBefore>},
      {"acquire_barrier_no_barrier_after", "", acquire_rotation<Wait::kNoBarrierAfter>},
      {"grid_sync", nullptr, grid_rotation<true>},
      {"grid_sync_missing", "global buffer 'scratch'", grid_rotation<false>},
      {"last_block", nullptr, last_block<true, true>},
      {"last_block_no_fence_before", "data race on global buffer 'partial'", last_block<false, true>},
      {"last_block_no_fence_after", "data race on global buffer 'partial'", last_block<true, false>},
      {"lock", nullptr, under_lock<true>},
      {"lock_no_fences", "data race on global buffer 'sum'", under_lock<false>},
      {"flag_in_block", nullptr, handing_over<true>},
      {"flag_in_block_no_fences", "data race on shared+0", handing_over<false>},
      {"spin_for_nobody", "deadlock", spin_for_nobody},
      {"bare_spin_cooperative", nullptr, bare_spin<true>},
      {"bare_spin", "deadlock", bare_spin<false>},
      {"grid_sync_not_cooperative", "not cooperative", [] { launch({.grid = 2}, sync_grid); }},
      {"exit_then_grid_sync", "grid barrier after other threads have exited", missed_grid_sync<true>},
      {"grid_sync_then_exit", "a thread exits while others wait in a grid barrier", missed_grid_sync<false>},
      {"flag", nullptr, relay<Relay::kNone>},
      {"flag_write_after_fence", "data race on global buffer 'value'", relay<Relay::kWriteAfterFence>},
      {"flag_overwritten", "data race on global buffer 'value'", relay<Relay::kOverwriteFlag>},
      {"flag_added_to", nullptr, relay<Relay::kAddToFlag>},
      {"plain_and_atomic", "data race on global buffer 'counter'", plain_and_atomic},
      {"atomics", nullptr, atomics},
  };
}

}  // namespace selftest
