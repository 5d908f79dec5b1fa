// Lanes of a warp: shuffles, votes, masks, and what __syncwarp orders.
#include "case.h"

namespace selftest {
namespace {

using simt::Access;

constexpr unsigned kAll = 0xffffffffu;

template <typename T>
__global__ void shuffle_all_ways(T* output) {
  const int lane = static_cast<int>(threadIdx.x);
  const T mine = static_cast<T>(lane);
  T* const mine_out = output + lane * 6;
  mine_out[0] = __shfl_sync(kAll, mine, 5);
  mine_out[1] = __shfl_xor_sync(kAll, mine, 1);
  mine_out[2] = __shfl_up_sync(kAll, mine, 2);
  mine_out[3] = __shfl_down_sync(kAll, mine, 2);
  mine_out[4] = __shfl_down_sync(kAll, mine, 3, 8);
  mine_out[5] = __shfl_sync(kAll, mine, 1, 16);
}

template <typename T>
void shuffles() {
  Buffer<T> output("output", 32 * 6, Access::kUninitialised);
  launch({}, shuffle_all_ways<T>, output.data());
  for (int lane = 0; lane < 32; ++lane) {
    const int expected[6] = {5,
                             lane ^ 1,
                             lane < 2 ? lane : lane - 2,
                             lane > 29 ? lane : lane + 2,
                             lane % 8 > 4 ? lane : lane + 3,
                             lane / 16 * 16 + 1};
    for (int i = 0; i < 6; ++i) require(output[lane * 6 + i] == static_cast<T>(expected[i]), "shuffled");
  }
}

// Two halves of a warp on their own: masks of 16 lanes, in divergent code.
__global__ void reduce_halves(float* output) {
  const unsigned mask = threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
  float sum = static_cast<float>(threadIdx.x);
  if (threadIdx.x < 16) {
    for (int offset = 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(mask, sum, offset, 16);
  } else {
    for (int offset = 1; offset < 16; offset *= 2) sum += __shfl_xor_sync(mask, sum, offset, 16);
  }
  output[threadIdx.x] = sum;
}

void halves() {
  Buffer<float> output("output", 32, Access::kUninitialised);
  launch({}, reduce_halves, output.data());
  require(output[3] == 120.0f && output[20] == 376.0f, "summed");
}

__global__ void vote(unsigned* output) {
  const unsigned t = threadIdx.x;
  const unsigned ballot = __ballot_sync(kAll, t % 3 == 0);
  const bool right = __any_sync(kAll, t == 4) != 0 && __any_sync(kAll, 0) == 0 && __all_sync(kAll, 1) != 0 &&
                     __all_sync(kAll, t != 9) == 0;
  output[t] = right ? ballot : 0;
}

void votes() {
  Buffer<unsigned> output("output", 32, Access::kUninitialised);
  launch({}, vote, output.data());
  require(output[0] == 0x49249249u && output[31] == 0x49249249u, "voted");
}

// A block that ends within a warp.
__global__ void sum_partial_warp(unsigned* output) {
  output[threadIdx.x] = static_cast<unsigned>(__popc(__ballot_sync(kAll, 1)));
  __syncwarp();
}

void partial_warp() {
  Buffer<unsigned> output("output", 40, Access::kUninitialised);
  launch({.block = 40}, sum_partial_warp, output.data());
  require(output[0] == 32 && output[39] == 8, "lanes counted");
}

enum class By { kSyncWarp, kHalves, kQuarters, kShuffle, kNothing };

// Lanes exchange through shared memory, `kDistance` apart.
template <By kBy, unsigned kDistance>
__global__ void exchange(float* output) {
  BNEXT_DYNAMIC_SHARED(raw);
  auto* const values = reinterpret_cast<float*>(raw);
  const unsigned t = threadIdx.x;
  const unsigned lane = t % 32;
  for (int round = 0; round < 3; ++round) {
    float* const buffer = values + (round % 2) * blockDim.x;
    buffer[t] = static_cast<float>(t);
    if (kBy == By::kSyncWarp) __syncwarp();
    if (kBy == By::kHalves) __syncwarp(lane < 16 ? 0x0000ffffu : 0xffff0000u);
    if (kBy == By::kQuarters) __syncwarp(0xffu << (lane / 8 * 8));
    if (kBy == By::kShuffle) __shfl_xor_sync(kAll, 1.0f, 1);
    output[t] = buffer[t ^ kDistance];
  }
}

template <By kBy, unsigned kDistance>
void exchanges() {
  Buffer<float> output("output", 64, Access::kUninitialised);
  launch({.block = 64, .shared = 128 * sizeof(float)}, exchange<kBy, kDistance>, output.data());
}

__global__ void leave_self_out(float* output) {
  output[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, static_cast<float>(threadIdx.x), 1);
}

void self_left_out() {
  Buffer<float> output("output", 32, Access::kUninitialised);
  launch({}, leave_self_out, output.data());
}

// One lane exits for sure before the others shuffle, or while they wait for it.
template <bool kExitFirst>
__global__ void name_exited_lane(unsigned* others, float* output) {
  const bool misses = threadIdx.x == 7;
  if (misses != kExitFirst) {
    while (bnext_load_acquire(others) < (kExitFirst ? 1u : 31u)) {
    }
  }
  if (misses == kExitFirst) bnext_add_release(others, 1);
  if (!misses) output[threadIdx.x] = __shfl_sync(kAll, 1.0f, 0);
}

template <bool kExitFirst>
void exited_lane() {
  Buffer<unsigned> others("others", 1, Access::kReadWrite);
  Buffer<float> output("output", 32, Access::kUninitialised);
  launch({}, name_exited_lane<kExitFirst>, others.data(), output.data());
}

// A shuffle makes the lanes wait for one another here, but it orders no memory: the reads race with the write, though
// they always come first. The writer is the first of the readers.
__global__ void read_shuffle_overwrite(float* output) {
  BNEXT_DYNAMIC_SHARED(raw);
  auto* const value = reinterpret_cast<float*>(raw);
  const unsigned t = threadIdx.x;
  if (t == 0) *value = 1.0f;
  __syncwarp();
  float mine = 0.0f;
  if (t == 9) mine = *value;
  mine = __shfl_sync(kAll, mine, 9);
  if (t != 9) mine += *value;
  output[t] = __shfl_xor_sync(kAll, mine, 1);
  if (t == 9) *value = 2.0f;
}

void overwritten_after_shuffle() {
  Buffer<float> output("output", 32, Access::kUninitialised);
  launch({.shared = 4}, read_shuffle_overwrite, output.data());
}

__global__ void name_waiting_lane(float* output) {
  if (threadIdx.x == 7) {
    output[7] = static_cast<float>(__any_sync(kAll, 1));
  } else {
    output[threadIdx.x] = __shfl_sync(kAll, 1.0f, 0);
  }
}

void waiting_lane() {
  Buffer<float> output("output", 32, Access::kUninitialised);
  launch({}, name_waiting_lane, output.data());
}

__global__ void read_outside_mask(float* output) {
  if (threadIdx.x < 16) output[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 20);
}

void outside_mask() {
  Buffer<float> output("output", 32, Access::kUninitialised);
  launch({}, read_outside_mask, output.data());
}

__global__ void read_missing_lane(float* output) { output[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 16); }

void missing_lane() {
  Buffer<float> output("output", 32, Access::kUninitialised);
  launch({.block = 24}, read_missing_lane, output.data());
}

__global__ void shuffle_odd_width(float* output) { output[threadIdx.x] = __shfl_sync(kAll, 1.0f, 0, 12); }

void odd_width() {
  Buffer<float> output("output", 32, Access::kUninitialised);
  launch({}, shuffle_odd_width, output.data());
}

}  // namespace

std::vector<Case> warp_cases() {
  constexpr const char* kRace = "data race on shared";
  return {
      {"shuffle_int", nullptr, shuffles<int>},
      {"shuffle_float", nullptr, shuffles<float>},
      {"shuffle_double", nullptr, shuffles<double>},
      {"shuffle_long_long", nullptr, shuffles<unsigned long long>},
      {"halves_of_a_warp", nullptr, halves},
      {"votes", nullptr, votes},
      {"partial_warp", nullptr, partial_warp},
      {"exchange_syncwarp", nullptr, exchanges<By::kSyncWarp, 17>},
      {"exchange_syncwarp_halves", nullptr, exchanges<By::kHalves, 9>},
      {"exchange_syncwarp_quarters", nullptr, exchanges<By::kQuarters, 5>},
      {"exchange_across_halves", kRace, exchanges<By::kHalves, 17>},
      {"exchange_across_warps", kRace, exchanges<By::kSyncWarp, 32>},
      {"exchange_by_shuffle", kRace, exchanges<By::kShuffle, 1>},
      {"exchange_by_nothing", kRace, exchanges<By::kNothing, 1>},
      {"mask_without_self", "does not name the calling lane", self_left_out},
      {"read_shuffle_overwrite", kRace, overwritten_after_shuffle},
      {"exit_then_mask_names_lane", "which names a lane that has exited", exited_lane<true>},
      {"mask_names_lane_then_exit", "which names a lane that has exited", exited_lane<false>},
      {"mask_names_waiting_lane", "of which some lanes do not participate", waiting_lane},
      {"read_outside_mask", "does not name lane 20 that is read", outside_mask},
      {"read_missing_lane", "that is read", missing_lane},
      {"shuffle_odd_width", "width that is no power of two", odd_width},
  };
}

}  // namespace selftest
