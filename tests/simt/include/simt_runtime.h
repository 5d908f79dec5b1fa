// What the headers that stand in for the toolkit's call: implemented by the emulator, which is not instrumented.
//
// Kernels hand memory to these functions instead of touching it, so that an access which says more than its address
// (a scope, an order, a vector's alignment) is checked once, with what it says.
#pragma once

#include <cstddef>
#include <cstdint>

#include "simt_types.h"

namespace simt {

unsigned char* dynamic_shared();

enum class Reduce { kNone, kOr, kAnd, kCount };
int block_barrier(Reduce reduce, int predicate);

enum class WarpOp { kSync, kBallot, kAny, kAll, kShuffle, kShuffleUp, kShuffleDown, kShuffleXor };
// `argument` and `width` are the shuffles'.
std::uint64_t warp_meet(WarpOp op, unsigned mask, std::uint64_t value, int argument, int width);

void cluster_arrive();
void cluster_wait();
void cluster_sync();
unsigned cluster_rank();
unsigned cluster_blocks();
void* cluster_map(const void* own, unsigned rank);
void grid_sync();

void load(void* value, const void* address, std::size_t bytes);
void store(void* address, const void* value, std::size_t bytes);

enum class Order { kRelaxed, kAcquire, kRelease };
void atomic_load(void* value, const void* address, std::size_t bytes, Order order);
// A read-modify-write is an atomic_read and an atomic_write with nothing in between.
void atomic_read(void* old, void* address, std::size_t bytes);
void atomic_write(void* address, const void* updated, std::size_t bytes, Order order);

enum class Scope { kBlock, kDevice };
void fence(Scope scope);
void pause();
[[noreturn]] void trap();

void async_copy(void* shared, const void* global, std::size_t bytes, std::size_t zero_fill);
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
