// Lanes of a warp: shuffles, votes and masks.
#include "case.h"

namespace selftest {
namespace {

constexpr unsigned kAll = 0xffffffffu;

template <typename T>
__global__ void shuffle(T* output) {
  const T mine = static_cast<T>(threadIdx.x);
  output[2 * threadIdx.x] = __shfl_xor_sync(kAll, mine, 5);
  output[2 * threadIdx.x + 1] = __shfl_xor_sync(kAll, mine, 12, 8);  // beyond the end of a group: its own
}

template <typename T>
void shuffles() {
  const auto output = output_of<T>(64, {}, shuffle<T>);
  for (int lane = 0; lane < 32; ++lane) {
    require(output[2 * lane] == static_cast<T>(lane ^ 5), "shuffled");
    const bool is_behind = (lane ^ 12) >= (lane / 8 + 1) * 8;
    require(output[2 * lane + 1] == static_cast<T>(is_behind ? lane : lane ^ 12), "shuffled in groups");
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
  const auto output = output_of<float>(32, {}, reduce_halves);
  require(output[3] == 120.0f && output[20] == 376.0f, "summed");
}

// The vote of a whole warp, and of a warp that the block fills in part.
__global__ void vote(unsigned* output) { output[threadIdx.x] = __ballot_sync(kAll, threadIdx.x % 3 == 0); }

void votes() {
  const auto output = output_of<unsigned>(40, {.block = 40}, vote);
  require(output[0] == 0x49249249u && output[31] == 0x49249249u, "voted");
  require(output[32] == 0x92u && output[39] == 0x92u, "voted in a part of a warp");
}

// A shuffle makes the lanes wait for one another here, but it orders no memory: the reads race with the writes, though
// they always come after them.
template <bool kShuffles>
__global__ void exchange(float* output) {
  SHARED_VALUES(float, values);
  values[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (kShuffles) __shfl_xor_sync(kAll, 1.0f, 1);
  output[threadIdx.x] = values[threadIdx.x ^ 1];
}

template <bool kShuffles>
void exchanged() {
  output_of<float>(64, {.block = 64, .shared = 64 * sizeof(float)}, exchange<kShuffles>);
}

// The same for reads, which always come before the write. The writer is the first of the readers.
__global__ void read_shuffle_overwrite(float* output) {
  SHARED_VALUES(float, value);
  const unsigned t = threadIdx.x;
  if (t == 0) *value = 1.0f;
  __syncthreads();
  float mine = 0.0f;
  if (t == 9) mine = *value;
  mine = __shfl_xor_sync(kAll, mine, 1);
  if (t != 9) mine += *value;
  output[t] = __shfl_xor_sync(kAll, mine, 1);
  if (t == 9) *value = 2.0f;
}

// One lane exits for sure before the others shuffle, or while they wait for it.
template <bool kExitFirst>
__global__ void name_exited_lane(unsigned* others, float* output) {
  const bool misses = threadIdx.x == 7;
  if (misses != kExitFirst) {
    while (bnext_load_acquire(others) < (kExitFirst ? 1u : 31u)) {
    }
  }
  if (misses == kExitFirst) bnext_add_acq_rel(others, 1);
  if (!misses) output[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
}

template <bool kExitFirst>
void exited_lane() {
  Buffer<unsigned> others("others", 1, simt::Access::kReadWrite);
  output_of<float>(32, {}, name_exited_lane<kExitFirst>, others.data());
}

__global__ void name_waiting_lane(float* output) {
  if (threadIdx.x == 7) {
    output[7] = static_cast<float>(__ballot_sync(kAll, 1));
  } else {
    output[threadIdx.x] = __shfl_xor_sync(kAll, 1.0f, 1);
  }
}

// The first `kLanes` lanes shuffle with these arguments.
template <unsigned kMask, int kDistance, int kWidth, unsigned kLanes>
__global__ void shuffle_wrongly(float* output) {
  if (threadIdx.x < kLanes) output[threadIdx.x] = __shfl_xor_sync(kMask, 1.0f, kDistance, kWidth);
}

template <unsigned kMask, int kDistance, int kWidth = 32, unsigned kLanes = 32>
void wrong_shuffle() {
  output_of<float>(32, {}, shuffle_wrongly<kMask, kDistance, kWidth, kLanes>);
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
      {"exchange_by_shuffle", kRace, exchanged<true>},
      {"exchange_by_nothing", kRace, exchanged<false>},
      {"read_shuffle_overwrite", kRace, [] { output_of<float>(32, {.shared = 4}, read_shuffle_overwrite); }},
      {"exit_then_mask_names_lane", "which names a lane that has exited", exited_lane<true>},
      {"mask_names_lane_then_exit", "which names a lane that has exited", exited_lane<false>},
      {"mask_names_waiting_lane", "of which some lanes do not participate",
       [] { output_of<float>(32, {}, name_waiting_lane); }},
      {"mask_without_self", "does not name the calling lane", wrong_shuffle<0x0000ffffu, 1>},
      {"read_outside_mask", "under mask 0xffff, which does not name lane ", wrong_shuffle<0x0000ffffu, 20, 32, 16>},
      {"read_missing_lane", "that is read",
       [] { output_of<float>(24, {.block = 24}, shuffle_wrongly<kAll, 16, 32, 32>); }},
      {"shuffle_odd_width", "width that is no power of two", wrong_shuffle<kAll, 1, 12>},
  };
}

}  // namespace selftest
