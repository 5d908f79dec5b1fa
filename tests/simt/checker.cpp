#include "checker.h"

namespace simt {
namespace {

const char* verb(Kind kind) { return kind == Kind::kRead ? "read" : "write"; }

std::string describe(const MemoryAccess& access) {
  return std::string(access.atomic ? "atomic or volatile " : "") + verb(access.kind) + " of " +
         std::to_string(access.bytes) + " bytes";
}

// Reports the access and stops the launch, which would touch memory that is not the kernel's, or get a signal.
[[noreturn]] void fault(Thread& thread, const MemoryAccess& access, Defect defect, const std::string& what) {
  if (thread.launch->is_new(defect, access.site)) {
    thread.launch->report(what + ": " + describe(access) + " " + describe_where(thread, access.site));
  }
  thread.launch->abandon(thread);
}

// The shared memory of a block of the thread's cluster.
Region* find_shared(Thread& thread, const MemoryAccess& access) {
  if (thread.block->shared_region->contains(access.address)) return thread.block->shared_region.get();
  for (const auto& block : thread.block->cluster->blocks) {
    if (!block->shared_region->contains(access.address)) continue;
    const auto place = [&] { return describe_place(*block->shared_region, access.address); };
    if (block->exited == thread.launch->shape().threads) {
      fault(thread, access, Defect::kCluster, "use of the shared memory of an exited block, " + place());
    }
    if (thread.cluster_barriers == 0 && thread.launch->is_new(Defect::kCluster, access.site)) {
      thread.launch->report("use of another block's shared memory before the first cluster barrier, " + place() + ": " +
                            describe(access) + " " + describe_where(thread, access.site));
    }
    block->remote_uses[thread.id] = {thread.tick, access.site};
    return block->shared_region.get();
  }
  return nullptr;
}

void report_race(Thread& thread, const Region& region, const MemoryAccess& access, const Record& other, Kind kind) {
  const auto site = reinterpret_cast<Site>(static_cast<std::uintptr_t>(other.site));
  Launch& launch = *thread.launch;
  if (other.in_flight) {
    if (!launch.is_new(Defect::kAsyncCopy, access.site, site)) return;
    launch.report(std::string(verb(access.kind)) + " of " + describe_place(region, access.address) +
                  " while an asynchronous copy to it is in flight, issued by " +
                  describe_thread(launch.shape(), other.thread) + " at " + source_line(site) + ": " + describe(access) +
                  " " + describe_where(thread, access.site));
    return;
  }
  if (!launch.is_new(Defect::kRace, access.site, site)) return;
  launch.report("data race on " + describe_place(region, access.address) + ": " + describe(access) + " " +
                describe_where(thread, access.site) + ", and " + verb(kind) + " by " +
                describe_thread(launch.shape(), other.thread) + " at " + source_line(site));
}

bool races(const Thread& thread, const MemoryAccess& access, const Record& other) {
  if (other.thread == 0) return false;
  if (other.in_flight) return true;
  return !(access.atomic && other.atomic) && !thread.is_after(other);
}

// Keeps as many readers as there is room for. One that happened before this read needs no room, as whoever is ordered
// after this read is ordered after it; among the others, those of distant threads are worth more.
void note_read(const Thread& thread, Cell& cell, const Record& record) {
  Record* victim = nullptr;
  for (Record& read : cell.reads) {
    const bool keeps_less = read.atomic || !record.atomic;
    if (read.thread == 0 || (read.thread == record.thread && keeps_less)) {
      read = record;
      return;
    }
    if (keeps_less && thread.is_after(read)) victim = &read;
  }
  if (victim == nullptr) {
    for (Record& read : cell.reads) {
      const auto apart = static_cast<std::int64_t>(read.thread) - static_cast<std::int64_t>(record.thread);
      if (-32 < apart && apart < 32) victim = &read;
    }
  }
  (victim != nullptr ? *victim : cell.reads[record.tick % kReads]) = record;
}

void check_read(Thread& thread, Region& region, const MemoryAccess& access, Cell& cell, const Record& record) {
  if (cell.write.thread == 0) {
    const bool is_error = region.access == Access::kUninitialised;
    if (is_error && thread.launch->is_new(Defect::kUninitialised, access.site)) {
      thread.launch->report("read of " + describe_place(region, access.address) + ", which was never written: " +
                            describe(access) + " " + describe_where(thread, access.site));
    }
  } else if (races(thread, access, cell.write)) {
    report_race(thread, region, access, cell.write, Kind::kWrite);
  }
  note_read(thread, cell, record);
}

void check_write(Thread& thread, Region& region, const MemoryAccess& access, Cell& cell, const Record& record) {
  if (races(thread, access, cell.write)) report_race(thread, region, access, cell.write, Kind::kWrite);
  for (const Record& read : cell.reads) {
    if (races(thread, access, read)) report_race(thread, region, access, read, Kind::kRead);
  }
  cell = Cell{record, {}};
}

}  // namespace

void Thread::adopt(const KnowledgePtr& other) {
  knowledge = other;
  block_known = tick_at(knowledge, block_place(block->number));
}

void Thread::learn(const KnowledgePtr& other) {
  const KnowledgePtr joined = join(knowledge, other);
  if (joined != knowledge) adopt(joined);
}

bool Thread::is_after(const Record& record) const {
  // Earlier launches have happened before.
  if (record.thread == id || record.tick <= launch->first_tick()) return true;
  const std::uint32_t number = static_cast<std::uint32_t>(record.thread) - 1;
  const unsigned threads = launch->shape().threads;
  if (number / threads == block->number && record.tick <= block_known) return true;
  return covers(knowledge, number / threads, number % threads, record.tick);
}

Region* locate(Thread& thread, const MemoryAccess& access) {
  if (thread.fiber.on_stack(access.address)) return nullptr;
  Region* region = find_shared(thread, access);
  if (region == nullptr) region = device().memory.find(access.address);
  if (region == nullptr) {
    const auto arguments = reinterpret_cast<std::uintptr_t>(thread.launch->kernel().arguments);
    if (access.kind == Kind::kRead) {
      if (access.address - arguments < thread.launch->kernel().argument_bytes) return nullptr;
      if (is_constant_data(access.address, access.bytes)) return nullptr;
    }
    fault(thread, access, Defect::kOutside, "access outside any registered buffer");
  }
  const auto place = [&] { return describe_place(*region, access.address); };
  if (access.bytes > region->bytes - (access.address - region->begin)) {
    fault(thread, access, Defect::kOutside, "access outside any registered buffer, beyond the end from " + place());
  }
  if (access.address % access.alignment != 0) {
    fault(thread, access, Defect::kMisaligned, "misaligned access to " + place());
  }
  if (access.kind == Kind::kWrite && region->access == Access::kRead) {
    fault(thread, access, Defect::kReadOnly, "write to read-only " + place());
  }
  return region;
}

void check_order(Thread& thread, Region& region, const MemoryAccess& access) {
  // Nobody writes to the region: there is nothing to be ordered with.
  if (region.access == Access::kRead) return;
  thread.accessed_since_arrival = true;
  Record record{};
  record.thread = thread.id;
  record.tick = thread.tick;
  record.site = reinterpret_cast<std::uintptr_t>(access.site);
  record.atomic = access.atomic;
  const Shadow::Span cells = region.shadow.cells(access.address - region.begin, access.bytes);
  for (Cell* cell = cells.begin; cell != cells.end; ++cell) {
    if (access.kind == Kind::kRead) {
      check_read(thread, region, access, *cell, record);
    } else {
      check_write(thread, region, access, *cell, record);
    }
  }
}

void check_access(Thread& thread, const MemoryAccess& access) {
  Region* const region = locate(thread, access);
  if (region == nullptr) return;
  Counters& counters = device().counters;
  if (device().options.count_requests && access.bytes == kVectorBytes) {
    device().requests.note(thread, access.site, access.address, region->shared);
  }
  if (!region->shared) {
    (access.kind == Kind::kRead ? counters.global_load_bytes : counters.global_store_bytes) += access.bytes;
  }
  if (access.kind == Kind::kWrite) thread.launch->note_progress();
  check_order(thread, *region, access);
}

void record_write(Shadow::Span cells, const Record& record) {
  for (Cell* cell = cells.begin; cell != cells.end; ++cell) *cell = Cell{record, {}};
}

void check_remote_uses(Launch& launch, const Block& block) {
  for (const auto& [id, use] : block.remote_uses) {
    const std::uint32_t number = id - 1;
    const unsigned threads = launch.shape().threads;
    if (covers(block.at_exit, number / threads, number % threads, use.tick)) continue;
    if (!launch.is_new(Defect::kCluster, use.site, &block)) continue;
    launch.report(
        "a block exits while another may still use its shared memory: " + describe_thread(launch.shape(), id) + " at " +
        source_line(use.site) + ", not ordered before the exit of block " + std::to_string(block.number) +
        " of kernel " + function_name(launch.kernel().function));
  }
}

std::string describe_thread(const LaunchShape& shape, std::uint32_t id) {
  const unsigned threads = shape.threads;
  return "block " + std::to_string((id - 1) / threads) + " thread " + std::to_string((id - 1) % threads);
}

std::string describe_place(const Region& region, std::uintptr_t address) {
  const std::string offset = std::to_string(address - region.begin);
  if (region.shared) return region.name + "+" + offset + " of " + std::to_string(region.bytes);
  return "global buffer '" + region.name + "' + " + offset + " of " + std::to_string(region.bytes);
}

std::string describe_where(const Thread& thread, Site site) {
  return "in kernel " + function_name(thread.launch->kernel().function) + ", " +
         describe_thread(thread.launch->shape(), thread.id) + " at " + source_line(site);
}

}  // namespace simt
