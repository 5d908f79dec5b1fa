// Asynchronous copies: nothing lands before the wait that covers it, which is as late as the device may be.
#include <cstring>
#include <utility>

#include "checker.h"

namespace simt {
namespace {

// Findings about either end of a copy name the line that issued it.
MemoryAccess source_read(const AsyncCopy& copy) {
  return {reinterpret_cast<std::uintptr_t>(copy.global), copy.bytes, copy.bytes, Kind::kRead, false, copy.site};
}

MemoryAccess destination_write(const AsyncCopy& copy) {
  return {reinterpret_cast<std::uintptr_t>(copy.shared), copy.bytes, copy.bytes, Kind::kWrite, false, copy.site};
}

void report(Thread& thread, const AsyncCopy& copy, const std::string& text, Site where) {
  if (!thread.launch->is_new(Defect::kAsyncCopy, copy.site, where)) return;
  thread.launch->report(text + ": issued " + describe_where(thread, copy.site));
}

void check_issue(Thread& thread, const AsyncCopy& copy) {
  if (copy.bytes != 4 && copy.bytes != 8 && copy.bytes != 16) {
    report(thread, copy, "asynchronous copy of an unsupported size " + std::to_string(copy.bytes), copy.site);
    thread.launch->abandon(thread);
  }
  // The destination first: the finding about it should not read as one about the source.
  const MemoryAccess write = destination_write(copy);
  Region* const region = thread.fiber.on_stack(write.address) ? nullptr : locate(thread, write);
  if (region != thread.block->shared_region.get()) {
    report(thread, copy, "asynchronous copy to other than the block's own shared memory", copy.site);
    thread.launch->abandon(thread);
  }
  check_access(thread, write);
  check_access(thread, source_read(copy));
  // A later write to the source, by this thread too, is then told from an earlier one by its tick.
  thread.tick = thread.launch->next_tick();
  Record record{};
  record.thread = thread.id;
  record.tick = copy.tick;
  record.site = reinterpret_cast<std::uintptr_t>(copy.site);
  record.in_flight = 1;
  record_write(region->shadow.cells(write.address - region->begin, write.bytes), record);
}

void check_landing(Thread& thread, const AsyncCopy& copy, Site wait_site) {
  const MemoryAccess write = destination_write(copy);
  Region& region = *thread.block->shared_region;
  Record record{};
  record.thread = thread.id;
  record.tick = thread.tick;
  record.site = reinterpret_cast<std::uintptr_t>(copy.site);
  record_write(region.shadow.cells(write.address - region.begin, write.bytes), record);

  // The source was in use from the issue until now.
  const MemoryAccess read = source_read(copy);
  Region* const source = locate(thread, read);
  if (source == nullptr || source->access == Access::kRead) return;
  const Shadow::Span cells = source->shadow.cells(read.address - source->begin, read.bytes);
  for (const Cell* cell = cells.begin; cell != cells.end; ++cell) {
    if (cell->write.tick <= copy.tick) continue;
    report(thread, copy,
           "write to " + describe_place(*source, read.address) +
               " while an asynchronous copy from it is in flight, by " +
               describe_thread(thread.launch->shape(), static_cast<std::uint32_t>(cell->write.thread)) + " at " +
               source_line(reinterpret_cast<Site>(static_cast<std::uintptr_t>(cell->write.site))),
           wait_site);
  }
  check_order(thread, *source, read);
}

}  // namespace

void async_copy(void* shared, const void* global, std::size_t bytes) {
  const EmulatorScope scope;
  Thread& thread = scope.thread();
  const AsyncCopy copy{shared, global, bytes, thread.launch->next_tick(), SIMT_SITE};
  if (device().options.check) check_issue(thread, copy);
  std::memset(shared, 0xff, bytes);
  thread.issued.push_back(copy);
}

void async_commit() {
  const EmulatorScope scope;
  scope.thread().committed.push_back(std::exchange(scope.thread().issued, {}));
}

void async_wait(unsigned groups_left) {
  const EmulatorScope scope;
  Thread& thread = scope.thread();
  if (thread.committed.size() <= groups_left) return;
  const auto end = thread.committed.end() - static_cast<std::ptrdiff_t>(groups_left);
  for (auto group = thread.committed.begin(); group != end; ++group) {
    for (const AsyncCopy& copy : *group) {
      if (device().options.check) check_landing(thread, copy, SIMT_SITE);
      std::memcpy(copy.shared, copy.global, copy.bytes);
    }
  }
  thread.committed.erase(thread.committed.begin(), end);
}

void check_no_copies(Thread& thread) {
  if (!thread.issued.empty()) {
    report(thread, thread.issued.front(), "thread exits with an asynchronous copy that was never committed", nullptr);
  }
  for (const auto& group : thread.committed) {
    if (group.empty()) continue;
    report(thread, group.front(), "thread exits with an asynchronous copy that was never waited for", nullptr);
    return;
  }
}

}  // namespace simt
