// The functions behind the device headers.
#include <cstring>

#include "async_copy.h"
#include "checker.h"
#include "clock.h"
#include "include/simt_runtime.h"

namespace simt {
namespace {

// Only in a function that a kernel calls itself.
#define SIMT_SITE __builtin_return_address(0)

void check(Thread& thread, const void* address, std::size_t bytes, Kind kind, bool atomic, Site site) {
  check_access(thread, {reinterpret_cast<std::uintptr_t>(address), bytes, bytes, kind, atomic, site});
}

// An atomic access also synchronises; returns where, or null where nothing is known of the place.
Region* check_atomic(Thread& thread, const void* address, std::size_t bytes, Kind kind, Site site) {
  const MemoryAccess access{reinterpret_cast<std::uintptr_t>(address), bytes, bytes, kind, true, site};
  Region* const region = locate(thread, access);
  if (region != nullptr) check_order(thread, *region, access);
  return region;
}

}  // namespace

unsigned char* dynamic_shared() { return running->block->shared.get(); }
unsigned cluster_rank() { return running->block->rank; }
unsigned cluster_blocks() { return running->launch->shape().cluster_blocks(); }

int block_barrier(Reduce reduce, int predicate) {
  const EmulatorScope scope;
  return scope.thread().launch->block_barrier(scope.thread(), reduce, predicate, SIMT_SITE);
}

std::uint64_t warp_meet(WarpOp op, unsigned mask, std::uint64_t value, int argument, int width) {
  const EmulatorScope scope;
  return scope.thread().launch->warp_meet(scope.thread(), op, mask, value, argument, width, SIMT_SITE);
}

void cluster_arrive() {
  const EmulatorScope scope;
  scope.thread().launch->cluster_arrive(scope.thread(), true, SIMT_SITE);
}

void cluster_wait() {
  const EmulatorScope scope;
  scope.thread().launch->cluster_wait(scope.thread(), SIMT_SITE);
}

void cluster_sync() {
  const EmulatorScope scope;
  scope.thread().launch->cluster_arrive(scope.thread(), false, SIMT_SITE);
  scope.thread().launch->cluster_wait(scope.thread(), SIMT_SITE);
}

void* cluster_map(const void* own, unsigned rank) {
  const EmulatorScope scope;
  const Thread& thread = scope.thread();
  const auto& blocks = thread.block->cluster->blocks;
  const Region& region = *thread.block->shared_region;
  const std::uintptr_t offset = reinterpret_cast<std::uintptr_t>(own) - region.begin;
  if (rank >= blocks.size() || offset > region.bytes) {
    if (thread.launch->is_new(Defect::kUsage, SIMT_SITE)) {
      thread.launch->report("map_shared_rank of a rank outside the cluster or of an address outside shared memory: " +
                            describe_where(thread, SIMT_SITE));
    }
    thread.launch->abandon(scope.thread());
  }
  return blocks[rank]->shared.get() + offset;
}

void grid_sync() {
  const EmulatorScope scope;
  scope.thread().launch->grid_barrier(scope.thread(), SIMT_SITE);
}

void load(void* value, const void* address, std::size_t bytes) {
  const EmulatorScope scope;
  if (device().options.check) check(scope.thread(), address, bytes, Kind::kRead, false, SIMT_SITE);
  std::memcpy(value, address, bytes);
}

void store(void* address, const void* value, std::size_t bytes) {
  const EmulatorScope scope;
  if (device().options.check) check(scope.thread(), address, bytes, Kind::kWrite, false, SIMT_SITE);
  std::memcpy(address, value, bytes);
}

void atomic_load(void* value, const void* address, std::size_t bytes, Order order) {
  const EmulatorScope scope;
  Thread& thread = scope.thread();
  thread.launch->maybe_pause(thread, SIMT_SITE);
  if (device().options.check) {
    Region* const region = check_atomic(thread, address, bytes, Kind::kRead, SIMT_SITE);
    if (region != nullptr) observe(thread, *region, reinterpret_cast<std::uintptr_t>(address), order);
  }
  std::memcpy(value, address, bytes);
}

void atomic_read(void* old, void* address, std::size_t bytes) {
  ++device().counters.atomics;
  const EmulatorScope scope;
  Thread& thread = scope.thread();
  thread.launch->maybe_pause(thread, SIMT_SITE);
  if (device().options.check) {
    Region* const region = check_atomic(thread, address, bytes, Kind::kRead, SIMT_SITE);
    if (region != nullptr) observe(thread, *region, reinterpret_cast<std::uintptr_t>(address), Order::kRelaxed);
  }
  std::memcpy(old, address, bytes);
}

void atomic_write(void* address, const void* updated, std::size_t bytes, Order order) {
  const EmulatorScope scope;
  Thread& thread = scope.thread();
  if (device().options.check) {
    Region* const region = check_atomic(thread, address, bytes, Kind::kWrite, SIMT_SITE);
    if (region != nullptr) publish(thread, *region, reinterpret_cast<std::uintptr_t>(address), order, true);
  }
  // One that changes nothing may be a spin.
  if (std::memcmp(address, updated, bytes) != 0) thread.launch->note_progress();
  std::memcpy(address, updated, bytes);
}

void fence(Scope fence_scope) {
  const EmulatorScope scope;
  ++device().counters.fences;
  if (device().options.check) fence_clock(scope.thread(), fence_scope);
}

void pause() {
  const EmulatorScope scope;
  scope.thread().launch->pause(scope.thread(), SIMT_SITE);
}

void trap() {
  const EmulatorScope scope;
  Launch& launch = *scope.thread().launch;
  if (launch.is_new(Defect::kTrap, SIMT_SITE)) launch.report("trap " + describe_where(scope.thread(), SIMT_SITE));
  launch.abandon(scope.thread());
}

void async_copy(void* shared, const void* global, std::size_t bytes, std::size_t zero_fill) {
  const EmulatorScope scope;
  issue_copy(scope.thread(),
             {shared, global, static_cast<std::uint32_t>(bytes), static_cast<std::uint32_t>(zero_fill), 0, SIMT_SITE});
}

void async_commit() {
  const EmulatorScope scope;
  commit_copies(scope.thread());
}

void async_wait(unsigned groups_left) {
  const EmulatorScope scope;
  wait_for_copies(scope.thread(), groups_left, SIMT_SITE);
}

}  // namespace simt
