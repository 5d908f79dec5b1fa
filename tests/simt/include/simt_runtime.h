// CUDA's qualifiers and built-in types, and what the device headers call: implemented by the emulator, which is not
// instrumented.
//
// Kernels hand memory to these functions instead of touching it, so that an access which says more than its address
// (an order, a vector's alignment) is checked once, with what it says.
#pragma once

#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// Kernel parameters are copied once for a launch, and no thread writes to them.
#define __grid_constant__

// Grids, blocks and clusters have one dimension: an index of more does not compile, and a launch of more is refused.
struct uint1 {
  unsigned x;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The alignments are the device's: a vector is moved by one instruction, which demands them.
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace simt {

unsigned char* dynamic_shared();

// Returns whether the predicate of any thread holds.
int block_barrier(int predicate);

enum class WarpOp { kBallot, kShuffleXor };
// `argument` is the lanes' distance, and `width` the size of the groups that they are shuffled in.
std::uint64_t warp_meet(WarpOp op, unsigned mask, std::uint64_t value, int argument, int width);

void cluster_arrive();
void cluster_wait();
void* cluster_map(const void* own, unsigned rank);

void load(void* value, const void* address, std::size_t bytes);
void store(void* address, const void* value, std::size_t bytes);

unsigned load_acquire(const unsigned* address);
// Returns the value from before. `orders`: by acquire and release.
unsigned atomic_add(unsigned* address, unsigned value, bool orders);
void pause();

void async_copy(void* shared, const void* global, std::size_t bytes);
void async_commit();
void async_wait(unsigned groups_left);

// `call(function, arguments)` runs the kernel for one thread.
struct Kernel {
  void (*call)(const void* function, const void* arguments);
  const void* function;
  const void* arguments;
  std::size_t argument_bytes;
};

}  // namespace simt
