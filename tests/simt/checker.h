// Checks every access of a kernel to memory: where it goes, and what it is not ordered with.
#pragma once

#include "machine.h"

namespace simt {

enum class Kind { kRead, kWrite };

struct MemoryAccess {
  std::uintptr_t address;
  std::size_t bytes;
  std::size_t alignment;
  Kind kind;
  bool atomic;
  Site site;
};

// The region that holds the whole access; null for what no other thread writes: the thread's own stack, the kernel's
// parameters and constants. Abandons the launch where the access must not happen at all.
Region* locate(Thread& thread, const MemoryAccess& access);
// Reports an access that is not ordered with all others to these bytes, and a read of bytes that were never written.
void check_order(Thread& thread, Region& region, const MemoryAccess& access);
// Calls both, and counts the bytes.
void check_access(Thread& thread, const MemoryAccess& access);

void record_write(Shadow::Span cells, const Record& record);

// What another block did to this one's shared memory must have happened before it exits.
void check_remote_uses(Launch& launch, const Block& block);

// A thread that exits must have waited for the asynchronous copies that it started.
void check_no_copies(Thread& thread);

std::string describe_thread(const LaunchShape& shape, std::uint32_t id);
std::string describe_place(const Region& region, std::uintptr_t address);
// "in kernel ..., block ... thread ... at file:line"
std::string describe_where(const Thread& thread, Site site);

}  // namespace simt
