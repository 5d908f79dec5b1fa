// Where accesses go: bounds, alignment, what may be written, what was written before it is read.
#include <cstdint>

#include "case.h"

namespace selftest {
namespace {

using simt::Access;

template <typename T>
__global__ void copy(const T* input, int elements, int shift, T* output) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < elements) output[i] = input[i + shift];
}

template <typename T>
void copy_values() {
  T value;
  __builtin_memset(&value, 1, sizeof(value));
  Buffer<T> input("input", 100, Access::kRead, value);
  const auto output = output_of<T>(100, {.grid = 4}, copy<T>, input.data(), 100, 0);
  require(__builtin_memcmp(input.data(), output.data(), 100 * sizeof(T)) == 0, "copied");
  const simt::Counters counters = simt::take_counters();
  const std::size_t bytes = is_checked() ? 100 * sizeof(T) : 0;
  require(counters.global_load_bytes == bytes && counters.global_store_bytes == bytes, "read and written once");
}

void copy_beyond_end() {
  Buffer<float> input("input", 100, Access::kRead, 1.0f);
  Buffer<float> output("output", 100, Access::kUninitialised);
  require(launch({.grid = 4}, copy<float>, input.data(), 100, 1, output.data()) == cudaErrorLaunchFailure, "failed");
  require(cudaGetLastError() == cudaErrorLaunchFailure && cudaGetLastError() == cudaSuccess, "the error is kept once");
}

void copy_unregistered() {
  float input[32] = {};
  output_of<float>(32, {}, copy<float>, input, 32, 0);
}

void write_read_only() {
  Buffer<float> input("input", 32, Access::kRead);
  Buffer<float> output("output", 32, Access::kRead);
  launch({}, copy<float>, input.data(), 32, 0, output.data());
}

template <int kWritten>
void read_what_a_launch_wrote() {
  Buffer<float> source("source", 32, Access::kRead);
  Buffer<float> input("input", 32, Access::kUninitialised);
  launch({}, copy<float>, source.data(), kWritten, 0, input.data());
  output_of<float>(32, {}, copy<float>, input.data(), 32, 0);
}

void leave_unwritten() {
  Buffer<char> untouched("untouched", 3, Access::kUninitialised);
  if (is_checked()) require(simt::unwritten_bytes(untouched.data()) == 3, "no more than there are");
  Buffer<short> input("input", 32, Access::kRead);
  Buffer<short> output("output", 32, Access::kUninitialised);
  launch({}, copy<short>, input.data(), 29, 0, output.data());
  if (is_checked()) require(simt::unwritten_bytes(output.data()) == 6, "three elements are missing");
}

// Copies by the intrinsics with cache hints.
template <typename T>
__global__ void copy_hinted(const T* input, T* output) {
  const unsigned i = threadIdx.x;
  __stcs(output + i, i % 2 == 0 ? __ldg(input + i) : __ldcg(input + i));
}

void hinted() {
  Buffer<uint4> input("input", 32, Access::kRead, {1, 2, 3, 4});
  require(output_of<uint4>(32, {}, copy_hinted<uint4>, input.data())[31].w == 4, "copied");
}

template <typename T>
T* displaced(T* data, int bytes) {
  return reinterpret_cast<T*>(reinterpret_cast<char*>(data) + bytes);
}

void hinted_misaligned() {
  Buffer<uint4> input("input", 40, Access::kRead);
  output_of<uint4>(40, {}, copy_hinted<uint4>, displaced(input.data(), 8));
}

void plain_misaligned() {
  Buffer<float4> input("input", 40, Access::kRead);
  Buffer<float4> output("output", 40, Access::kUninitialised);
  launch({}, copy<float4>, input.data(), 32, 0, displaced(output.data(), 8));
}

void hinted_beyond_end() {
  Buffer<float2> input("input", 31, Access::kRead);
  output_of<float2>(32, {}, copy_hinted<float2>, input.data());
}

__global__ void use_shared(unsigned written, unsigned index, float* output) {
  SHARED_VALUES(float, values);
  if (threadIdx.x < written) values[threadIdx.x] = 1.0f;
  __syncthreads();
  if (threadIdx.x == 0) output[0] = values[index];
}

template <unsigned kWritten, unsigned kIndex>
void shared_memory() {
  output_of<float>(1, {.shared = 32 * sizeof(float)}, use_shared, kWritten, kIndex);
}

__global__ void read_word(const unsigned* input, unsigned* output) { *output = input[1]; }

void across_end() {
  Buffer<unsigned short> input("input", 3, Access::kRead);
  output_of<unsigned>(1, {.block = 1}, read_word, reinterpret_cast<const unsigned*>(input.data()));
}

// Each thread writes one element of a word that several threads share.
template <typename T>
__global__ void write_neighbours(T* output) {
  SHARED_VALUES(T, values);
  values[threadIdx.x] = static_cast<T>(threadIdx.x);
  output[threadIdx.x] = static_cast<T>(values[threadIdx.x] + 1);
}

template <typename T>
void neighbours() {
  require(output_of<T>(64, {.block = 64, .shared = 64 * sizeof(T)}, write_neighbours<T>)[63] == 64, "written");
}

// One thread writes a word and another a half of it: the shadow is split while it is in use.
__global__ void write_word_and_half(unsigned* output) {
  if (threadIdx.x == 0) output[0] = 1;
  if (threadIdx.x == 32) reinterpret_cast<unsigned short*>(output)[1] = 2;
}

__global__ void write_same(float* output) { output[0] = static_cast<float>(threadIdx.x); }

template <unsigned kGrid, unsigned kBlock>
void same_element() {
  output_of<float>(1, {.grid = kGrid, .block = kBlock}, write_same);
}

void same_element_two_launches() {
  Buffer<float> output("output", 1, Access::kUninitialised);
  for (int i = 0; i < 2; ++i) launch({.block = 1}, write_same, output.data());
}

constexpr float kTable[4] = {1.0f, 2.0f, 4.0f, 8.0f};

struct Parameters {
  float scale[8];
  unsigned elements;
};

__global__ void use_parameters(Parameters parameters, float* output) {
  float local[8];
  for (unsigned i = 0; i < 8; ++i) local[i] = parameters.scale[(i + threadIdx.x) % 8];
  if (threadIdx.x < parameters.elements) output[threadIdx.x] = local[threadIdx.x % 8] * __ldg(kTable + threadIdx.x % 4);
}

void parameters() {
  const auto output = output_of<float>(32, {}, use_parameters, Parameters{{1, 1, 1, 1, 1, 1, 1, 1}, 32});
  require(output[3] == 8.0f, "the table's entry");
}

__global__ void share_local(float** addresses, float* output) {
  float local[2] = {1.0f, 2.0f};
  addresses[threadIdx.x] = local;
  __syncthreads();
  output[threadIdx.x] = addresses[threadIdx.x ^ 1][threadIdx.x & 1];
}

void local_of_another() {
  Buffer<float*> addresses("addresses", 32, Access::kUninitialised);
  output_of<float>(32, {}, share_local, addresses.data());
}

}  // namespace

std::vector<Case> access_cases() {
  return {
      {"copy_bytes", nullptr, copy_values<unsigned char>},
      {"copy_shorts", nullptr, copy_values<short>},
      {"copy_doubles", nullptr, copy_values<double>},
      {"copy_float2", nullptr, copy_values<float2>},
      {"copy_float4", nullptr, copy_values<float4>},
      {"copy_beyond_end", "access outside any registered buffer", copy_beyond_end},
      {"read_across_end", "beyond the end from global buffer 'input' + 4 of 6", across_end},
      {"copy_unregistered", "access outside any registered buffer", copy_unregistered},
      {"write_read_only", "write to read-only global buffer 'output' + ", write_read_only},
      {"read_unwritten_global", "read of global buffer 'input' + 124 of 128, which was never written",
       read_what_a_launch_wrote<31>},
      {"read_written_global", nullptr, read_what_a_launch_wrote<32>},
      {"leave_unwritten", nullptr, leave_unwritten},
      {"hinted", nullptr, hinted},
      {"hinted_misaligned", "misaligned access to global buffer 'input'", hinted_misaligned},
      {"plain_misaligned", "misaligned access to global buffer 'output'", plain_misaligned},
      {"hinted_beyond_end", "access outside any registered buffer", hinted_beyond_end},
      {"shared_written", nullptr, shared_memory<32, 31>},
      {"shared_unwritten", "read of shared+124 of 128, which was never written", shared_memory<31, 31>},
      {"shared_beyond_end", "access outside any registered buffer", shared_memory<32, 32>},
      {"neighbours_bytes", nullptr, neighbours<unsigned char>},
      {"neighbours_shorts", nullptr, neighbours<unsigned short>},
      {"word_and_half", "data race on global buffer 'output'",
       [] { output_of<unsigned>(1, {.block = 64}, write_word_and_half); }},
      {"same_element_in_block", "data race on global buffer 'output' + 0 of 4", same_element<1, 32>},
      {"same_element_in_grid", "data race on global buffer 'output' + 0 of 4", same_element<2, 1>},
      {"same_element_two_launches", nullptr, same_element_two_launches},
      {"parameters_and_constants", nullptr, parameters},
      {"local_of_another_thread", "access outside any registered buffer", local_of_another},
  };
}

}  // namespace selftest
