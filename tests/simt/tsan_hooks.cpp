// What -fsanitize=thread makes the kernels call before every access to memory, and in place of the C++ atomics they
// use.
#include <cstddef>
#include <cstdint>

#include "checker.h"

namespace simt {
namespace {

void plain_access(const void* address, std::size_t bytes, std::size_t alignment, Kind kind, Site site) {
  Thread* const thread = running;
  if (thread == nullptr || !device().options.check) return;
  const auto place = reinterpret_cast<std::uintptr_t>(address);
  if (thread->fiber.on_stack(place)) return;
  const EmulatorScope scope;
  check_access(*thread, {place, bytes, alignment, kind, false, site});
}

}  // namespace
}  // namespace simt

#define SIMT_HOOKS(bytes)                                                                                              \
  extern "C" void __tsan_read##bytes(void* p) { simt::plain_access(p, bytes, bytes, simt::Kind::kRead, SIMT_SITE); }   \
  extern "C" void __tsan_write##bytes(void* p) { simt::plain_access(p, bytes, bytes, simt::Kind::kWrite, SIMT_SITE); } \
  extern "C" void __tsan_unaligned_read##bytes(void* p) {                                                              \
    simt::plain_access(p, bytes, 1, simt::Kind::kRead, SIMT_SITE);                                                     \
  }                                                                                                                    \
  extern "C" void __tsan_unaligned_write##bytes(void* p) {                                                             \
    simt::plain_access(p, bytes, 1, simt::Kind::kWrite, SIMT_SITE);                                                    \
  }

SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)

extern "C" {

void __tsan_init() {}

void __tsan_read_range(void* p, std::size_t bytes) { simt::plain_access(p, bytes, 1, simt::Kind::kRead, SIMT_SITE); }
void __tsan_write_range(void* p, std::size_t bytes) { simt::plain_access(p, bytes, 1, simt::Kind::kWrite, SIMT_SITE); }

// A spin on a volatile is atomic, and orders nothing. The kernels acquire instead; a mutant puts a volatile there.
void __tsan_volatile_read4(void* p) {
  if (simt::running == nullptr) return;
  const simt::EmulatorScope scope;
  simt::Thread& thread = scope.thread();
  thread.launch->maybe_pause(thread, SIMT_SITE);
  if (!simt::device().options.check) return;
  const simt::MemoryAccess access{reinterpret_cast<std::uintptr_t>(p), 4, 4, simt::Kind::kRead, true, SIMT_SITE};
  simt::Region* const region = simt::locate(thread, access);
  if (region != nullptr) simt::check_order(thread, *region, access);
}

// C++ atomics are the launchers': host code, for which they only have to be atomic.
std::uint64_t __tsan_atomic64_load(const volatile std::uint64_t* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
std::uint64_t __tsan_atomic64_fetch_or(volatile std::uint64_t* p, std::uint64_t v, int) {
  return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST);
}

}  // extern "C"
