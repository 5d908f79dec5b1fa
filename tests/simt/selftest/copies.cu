// Asynchronous copies: each thread's groups, and what may touch their two ends meanwhile.
#include <cuda_pipeline_primitives.h>

#include "case.h"

namespace selftest {
namespace {

using simt::Access;

enum class Defect {
  kNone,
  kNoWait,
  kNoCommit,
  kReadEarly,
  kWriteDestination,
  kWriteSource,
  kReadOthers,
  kMisalign,
  kSize,
  kSourceBeyondEnd,
  kDestinationBeyondEnd,
  kToGlobal,
};

template <Defect kDefect>
__global__ void copy_through_shared(float4* input, float4* output) {
  SHARED_VALUES(float4, slots);
  const unsigned t = threadIdx.x;
  float4* destination = slots + t;
  const float4* source = input + t;
  if (kDefect == Defect::kMisalign) source = reinterpret_cast<const float4*>(&source->y);
  if (kDefect == Defect::kSourceBeyondEnd) source += 1;
  if (kDefect == Defect::kDestinationBeyondEnd) destination += 1;
  if (kDefect == Defect::kToGlobal) destination = output + t;
  __pipeline_memcpy_async(destination, source, kDefect == Defect::kSize ? 12 : 16);
  if (kDefect != Defect::kNoCommit) __pipeline_commit();
  if (kDefect == Defect::kReadEarly) output[t].x = slots[t].x;
  if (kDefect == Defect::kWriteDestination) slots[t].x = 1.0f;
  if (kDefect == Defect::kWriteSource) input[t].x = 1.0f;
  if (kDefect != Defect::kNoWait) __pipeline_wait_prior(0);
  if (kDefect != Defect::kReadOthers) __syncthreads();
  if (kDefect != Defect::kNoWait && kDefect != Defect::kNoCommit) output[t] = slots[t ^ 1];
}

template <Defect kDefect>
void copies() {
  Buffer<float4> input("input", 32, Access::kReadWrite, {1, 2, 3, 4});
  const auto output =
      output_of<float4>(32, {.shared = 32 * sizeof(float4)}, copy_through_shared<kDefect>, input.data());
  if (kDefect == Defect::kNone) require(output[5].w == 4.0f, "copied");
}

// A thread has slots of its own, which it fills `kStages` steps ahead, and again once it has read them.
template <int kStages, int kPrior>
__global__ void pipeline(const float* input, int steps, float* output) {
  SHARED_VALUES(float, all_slots);
  float* const slots = all_slots + threadIdx.x;
  const auto fill = [&](int step) {
    if (step < steps) {
      __pipeline_memcpy_async(slots + (step % kStages) * blockDim.x, input + step * blockDim.x + threadIdx.x, 4);
    }
    __pipeline_commit();
  };
  for (int step = 0; step < kStages; ++step) fill(step);
  float sum = 0.0f;
  for (int step = 0; step < steps; ++step) {
    __pipeline_wait_prior(kPrior);
    sum += slots[(step % kStages) * blockDim.x];
    fill(step + kStages);
  }
  __pipeline_wait_prior(0);
  output[threadIdx.x] = sum;
}

template <int kStages, int kPrior>
void pipelined() {
  Buffer<float> input("input", 64 * 10, Access::kRead, 2.0f);
  const Shape shape{.block = 64, .shared = kStages * 64 * sizeof(float)};
  const auto output = output_of<float>(64, shape, pipeline<kStages, kPrior>, input.data(), 10);
  if (kPrior < kStages) require(output[63] == 20.0f, "summed");
}

// Another thread reads the slot before it is filled again: only a barrier between the two orders them.
template <bool kCorrect>
__global__ void refill_shared_slot(const float* input, float* output) {
  SHARED_VALUES(float, slots);
  const unsigned t = threadIdx.x;
  float sum = 0.0f;
  for (int step = 0; step < 3; ++step) {
    __pipeline_memcpy_async(slots + t, input + t, 4);
    __pipeline_commit();
    __pipeline_wait_prior(0);
    __syncthreads();
    sum += slots[(t + 32) % 64];
    if (kCorrect) __syncthreads();
  }
  output[t] = sum;
}

template <bool kCorrect>
void refilled() {
  Buffer<float> input("input", 64, Access::kRead, 2.0f);
  output_of<float>(64, {.block = 64, .shared = 256}, refill_shared_slot<kCorrect>, input.data());
}

// The source changes between issue and wait, ordered by barriers with both.
__global__ void change_source_in_flight(float* data) {
  SHARED_VALUES(float, slots);
  if (threadIdx.x == 0) {
    __pipeline_memcpy_async(slots, data, 4);
    __pipeline_commit();
  }
  __syncthreads();
  if (threadIdx.x == 32) data[0] = 1.0f;
  __syncthreads();
  __pipeline_wait_prior(0);
}

void source_changed() {
  Buffer<float> data("data", 1, Access::kReadWrite);
  launch({.block = 64, .shared = 4}, change_source_in_flight, data.data());
}

__global__ void read_anothers_in_flight(const float* input, float* output) {
  SHARED_VALUES(float, slots);
  __pipeline_memcpy_async(slots + threadIdx.x, input + threadIdx.x, 4);
  __pipeline_commit();
  __syncthreads();
  output[threadIdx.x] = slots[threadIdx.x ^ 1];
  __pipeline_wait_prior(0);
}

void anothers_in_flight() {
  Buffer<float> input("input", 32, Access::kRead, 2.0f);
  output_of<float>(32, {.shared = 128}, read_anothers_in_flight, input.data());
}

enum class Unordered { kDestinationRead, kSourceWrittenBefore, kSourceWrittenAfter };

// Lane 1 touches an end of lane 0's copy. The votes say which comes first, but order no memory.
template <Unordered kUnordered>
__global__ void touch_unordered(float* data, float* output) {
  SHARED_VALUES(float, slot);
  const unsigned lane = threadIdx.x;
  const auto wait_for_lanes = [] { __ballot_sync(0xffffffffu, 1); };
  if (lane == 0) *slot = 0.0f;
  __syncthreads();
  if (lane == 1 && kUnordered == Unordered::kDestinationRead) output[1] = *slot;
  if (lane == 1 && kUnordered == Unordered::kSourceWrittenBefore) *data = 1.0f;
  wait_for_lanes();
  if (lane == 0) {
    __pipeline_memcpy_async(slot, data, 4);
    __pipeline_commit();
  }
  __syncthreads();
  if (lane == 0) __pipeline_wait_prior(0);
  wait_for_lanes();
  if (lane == 1 && kUnordered == Unordered::kSourceWrittenAfter) *data = 1.0f;
}

template <Unordered kUnordered>
void unordered() {
  Buffer<float> data("data", 1, Access::kReadWrite);
  output_of<float>(2, {.shared = 4}, touch_unordered<kUnordered>, data.data());
}

}  // namespace

std::vector<Case> copy_cases() {
  return {
      {"async_copy", nullptr, copies<Defect::kNone>},
      {"async_never_waited", "never waited for", copies<Defect::kNoWait>},
      {"async_never_committed", "never committed", copies<Defect::kNoCommit>},
      {"async_read_early", "while an asynchronous copy to it is in flight", copies<Defect::kReadEarly>},
      {"async_write_destination", "write of shared+", copies<Defect::kWriteDestination>},
      {"async_write_source", "while an asynchronous copy from it is in flight", copies<Defect::kWriteSource>},
      {"async_read_others", "data race on shared", copies<Defect::kReadOthers>},
      {"async_misaligned", "misaligned access to global buffer 'input'", copies<Defect::kMisalign>},
      {"async_unsupported_size", "unsupported size 12", copies<Defect::kSize>},
      {"async_source_beyond_end", "access outside any registered buffer", copies<Defect::kSourceBeyondEnd>},
      {"async_destination_beyond_end", "access outside any registered buffer", copies<Defect::kDestinationBeyondEnd>},
      {"async_to_global", "other than the block's own shared memory", copies<Defect::kToGlobal>},
      {"async_pipeline", nullptr, pipelined<3, 2>},
      {"async_pipeline_prior_too_large", "while an asynchronous copy to it is in flight", pipelined<3, 3>},
      {"async_refill", nullptr, refilled<true>},
      {"async_refill_unread", "data race on shared", refilled<false>},
      {"async_source_changed", "while an asynchronous copy from it is in flight", source_changed},
      {"async_read_anothers", "while an asynchronous copy to it is in flight", anothers_in_flight},
      {"async_destination_read", "data race on shared+0", unordered<Unordered::kDestinationRead>},
      {"async_source_written_before", "data race on global buffer 'data'", unordered<Unordered::kSourceWrittenBefore>},
      {"async_source_written_after", "data race on global buffer 'data'", unordered<Unordered::kSourceWrittenAfter>},
  };
}

}  // namespace selftest
