#include "clock.h"

namespace simt {

void adopt(Thread& thread, const KnowledgePtr& knowledge) {
  ThreadClock& clock = thread.clock;
  clock.knowledge = knowledge;
  clock.block_known = knowledge->at(block_place(thread.block->number));
  clock.warp_known = knowledge->at(warp_place(thread.block->number, thread.in_block));
}

void learn(Thread& thread, const KnowledgePtr& knowledge) {
  const KnowledgePtr joined = Knowledge::join(thread.clock.knowledge, knowledge);
  if (joined != thread.clock.knowledge) adopt(thread, joined);
}

bool happened_before(const Thread& thread, const Record& record) {
  const ThreadClock& clock = thread.clock;
  if (record.thread == thread.id || record.tick <= clock.knowledge->everywhere()) return true;
  const std::uint32_t number = static_cast<std::uint32_t>(record.thread) - 1;
  const std::uint32_t in_own_block = number - (thread.id - 1 - thread.in_block);
  const unsigned threads = thread.launch->shape().threads();
  if (in_own_block < threads) {
    if (record.tick <= clock.block_known) return true;
    if (in_own_block / 32 == thread.in_block / 32 && record.tick <= clock.warp_known) return true;
  }
  return clock.knowledge->covers(number / threads, number % threads, record.tick);
}

namespace {

// What the thread knows with all it did so far; what it does from now on is not in it.
KnowledgePtr snapshot(Thread& thread) {
  const Place place = thread_place(thread.block->number, thread.in_block);
  KnowledgePtr all = Knowledge::with(thread.clock.knowledge, {{place, thread.clock.tick}});
  thread.clock.tick = thread.launch->next_tick();
  return all;
}

}  // namespace

void fence_clock(Thread& thread, Scope scope) {
  ThreadClock& clock = thread.clock;
  learn(thread, clock.observed_block);
  if (scope == Scope::kDevice) learn(thread, clock.observed_device);
  clock.fenced_block = snapshot(thread);
  if (scope == Scope::kDevice) clock.fenced_device = clock.fenced_block;
}

void observe(Thread& thread, Region& region, std::uintptr_t address, Order order) {
  const auto found = region.sync_points.find(address);
  if (found == region.sync_points.end()) return;
  const SyncPoint& point = found->second;
  const KnowledgePtr in_block = point.block_id == thread.block->number ? point.block : nullptr;
  if (order == Order::kAcquire) {
    learn(thread, point.device);
    learn(thread, in_block);
    return;
  }
  ThreadClock& clock = thread.clock;
  clock.observed_device = Knowledge::join(clock.observed_device, point.device);
  clock.observed_block = Knowledge::join(clock.observed_block, in_block);
}

void publish(Thread& thread, Region& region, std::uintptr_t address, Order order, bool is_update) {
  const ThreadClock& clock = thread.clock;
  const KnowledgePtr released = order == Order::kRelease ? snapshot(thread) : nullptr;
  const KnowledgePtr device = Knowledge::join(clock.fenced_device, released);
  const KnowledgePtr block = Knowledge::join(clock.fenced_block, released);
  // A plain write ends what earlier writes released here; an update continues it.
  if (!is_update) region.sync_points.erase(address);
  if (block == nullptr) return;
  SyncPoint& point = region.sync_points[address];
  point.device = Knowledge::join(point.device, device);
  point.block = Knowledge::join(point.block_id == thread.block->number ? point.block : nullptr, block);
  point.block_id = thread.block->number;
}

}  // namespace simt
