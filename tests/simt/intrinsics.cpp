// The functions behind the device headers.
#include <cstring>

#include "checker.h"

namespace simt {
namespace {

// A vector must be aligned to its size, as the device demands.
void check(Thread& thread, const void* address, std::size_t bytes, Kind kind, Site site) {
  if (!device().options.check) return;
  check_access(thread, {reinterpret_cast<std::uintptr_t>(address), bytes, bytes, kind, false, site});
}

// Returns the region by which an atomic access may synchronise; null if nothing is checked or the memory is in none.
Region* check_atomic(Thread& thread, const void* address, Kind kind, Site site) {
  if (!device().options.check) return nullptr;
  const MemoryAccess access{reinterpret_cast<std::uintptr_t>(address), 4, 4, kind, true, site};
  Region* const region = locate(thread, access);
  if (region != nullptr) check_order(thread, *region, access);
  return region;
}

void acquire(Thread& thread, const Region& region, const void* address) {
  const auto found = region.released.find(reinterpret_cast<std::uintptr_t>(address));
  if (found != region.released.end()) thread.learn(found->second);
}

// It releases what the thread knows and has done so far, and nothing that it does from now on.
void release(Thread& thread, Region& region, const void* address) {
  KnowledgePtr& released = region.released[reinterpret_cast<std::uintptr_t>(address)];
  const Place place = thread_place(thread.block->number, thread.in_block);
  released = join(released, with(thread.knowledge, {{place, thread.tick}}));
  thread.tick = thread.launch->next_tick();
}

}  // namespace

unsigned char* dynamic_shared() { return running->block->shared.get(); }

int block_barrier(int predicate) {
  const EmulatorScope scope;
  return scope.thread().launch->block_barrier(scope.thread(), predicate != 0, SIMT_SITE);
}

std::uint64_t warp_meet(WarpOp op, unsigned mask, std::uint64_t value, int argument, int width) {
  const EmulatorScope scope;
  return scope.thread().launch->warp_meet(scope.thread(), op, mask, value, argument, width, SIMT_SITE);
}

void cluster_arrive() {
  const EmulatorScope scope;
  scope.thread().launch->cluster_arrive(scope.thread(), SIMT_SITE);
}

void cluster_wait() {
  const EmulatorScope scope;
  scope.thread().launch->cluster_wait(scope.thread(), SIMT_SITE);
}

void* cluster_map(const void* own, unsigned rank) {
  const EmulatorScope scope;
  Thread& thread = scope.thread();
  const auto& blocks = thread.block->cluster->blocks;
  const Region& region = *thread.block->shared_region;
  const std::uintptr_t offset = reinterpret_cast<std::uintptr_t>(own) - region.begin;
  if (rank >= blocks.size() || offset > region.bytes) {
    if (thread.launch->is_new(Defect::kUsage, SIMT_SITE)) {
      thread.launch->report("map_shared_rank of a rank outside the cluster or of an address outside shared memory: " +
                            describe_where(thread, SIMT_SITE));
    }
    thread.launch->abandon(thread);
  }
  return blocks[rank]->shared.get() + offset;
}

void load(void* value, const void* address, std::size_t bytes) {
  const EmulatorScope scope;
  check(scope.thread(), address, bytes, Kind::kRead, SIMT_SITE);
  std::memcpy(value, address, bytes);
}

void store(void* address, const void* value, std::size_t bytes) {
  const EmulatorScope scope;
  check(scope.thread(), address, bytes, Kind::kWrite, SIMT_SITE);
  std::memcpy(address, value, bytes);
}

unsigned load_acquire(const unsigned* address) {
  const EmulatorScope scope;
  Thread& thread = scope.thread();
  thread.launch->maybe_pause(thread, SIMT_SITE);
  if (const Region* region = check_atomic(thread, address, Kind::kRead, SIMT_SITE)) acquire(thread, *region, address);
  return *address;
}

unsigned atomic_add(unsigned* address, unsigned value, bool orders) {
  const EmulatorScope scope;
  Thread& thread = scope.thread();
  thread.launch->maybe_pause(thread, SIMT_SITE);
  check_atomic(thread, address, Kind::kRead, SIMT_SITE);
  Region* const region = check_atomic(thread, address, Kind::kWrite, SIMT_SITE);
  if (region != nullptr && orders) {
    acquire(thread, *region, address);
    release(thread, *region, address);
  }
  // An addition of zero may be a spin.
  if (value != 0) thread.launch->note_progress();
  const unsigned old = *address;
  *address = old + value;
  return old;
}

void pause() {
  const EmulatorScope scope;
  scope.thread().launch->pause(scope.thread(), SIMT_SITE);
}

}  // namespace simt
