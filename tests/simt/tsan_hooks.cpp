// What -fsanitize=thread makes the kernels call before every access to memory, and in place of every C++ atomic.
#include <cstddef>
#include <cstdint>

#include "checker.h"
#include "clock.h"

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

// A spin on a volatile is how threads of different blocks wait for one another, so it synchronises like an atomic.
void volatile_access(const void* address, std::size_t bytes, Kind kind, Site site) {
  Thread* const thread = running;
  if (thread == nullptr) return;
  const auto place = reinterpret_cast<std::uintptr_t>(address);
  if (thread->fiber.on_stack(place)) return;
  const EmulatorScope scope;
  if (kind == Kind::kRead) thread->launch->maybe_pause(*thread, site);
  if (!device().options.check) return;
  const MemoryAccess access{place, bytes, bytes, kind, true, site};
  Region* const region = locate(*thread, access);
  if (region == nullptr) return;
  check_order(*thread, *region, access);
  if (kind == Kind::kRead) {
    observe(*thread, *region, place, Order::kRelaxed);
  } else {
    publish(*thread, *region, place, Order::kRelaxed, false);
    thread->launch->note_progress();
  }
}

}  // namespace
}  // namespace simt

#define SIMT_SITE __builtin_return_address(0)

#define SIMT_HOOKS(bytes)                                                                                              \
  extern "C" void __tsan_read##bytes(void* p) { simt::plain_access(p, bytes, bytes, simt::Kind::kRead, SIMT_SITE); }   \
  extern "C" void __tsan_write##bytes(void* p) { simt::plain_access(p, bytes, bytes, simt::Kind::kWrite, SIMT_SITE); } \
  extern "C" void __tsan_unaligned_read##bytes(void* p) {                                                              \
    simt::plain_access(p, bytes, 1, simt::Kind::kRead, SIMT_SITE);                                                     \
  }                                                                                                                    \
  extern "C" void __tsan_unaligned_write##bytes(void* p) {                                                             \
    simt::plain_access(p, bytes, 1, simt::Kind::kWrite, SIMT_SITE);                                                    \
  }                                                                                                                    \
  extern "C" void __tsan_volatile_read##bytes(void* p) {                                                               \
    simt::volatile_access(p, bytes, simt::Kind::kRead, SIMT_SITE);                                                     \
  }                                                                                                                    \
  extern "C" void __tsan_volatile_write##bytes(void* p) {                                                              \
    simt::volatile_access(p, bytes, simt::Kind::kWrite, SIMT_SITE);                                                    \
  }

SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

void __tsan_read_range(void* p, std::size_t bytes) { simt::plain_access(p, bytes, 1, simt::Kind::kRead, SIMT_SITE); }
void __tsan_write_range(void* p, std::size_t bytes) { simt::plain_access(p, bytes, 1, simt::Kind::kWrite, SIMT_SITE); }

void __tsan_vptr_read(void** p) { simt::plain_access(p, sizeof(*p), sizeof(*p), simt::Kind::kRead, SIMT_SITE); }
void __tsan_vptr_update(void** p, void*) {
  simt::plain_access(p, sizeof(*p), sizeof(*p), simt::Kind::kWrite, SIMT_SITE);
}

// C++ atomics are the launchers' (a static's guard, a shared_ptr): host code, for which they only have to be atomic.
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) {}

}  // extern "C"

#define SIMT_ATOMIC_UPDATE(bits, name)                                                                        \
  extern "C" std::uint##bits##_t __tsan_atomic##bits##_##name(volatile void* p, std::uint##bits##_t v, int) { \
    return __atomic_##name(static_cast<volatile std::uint##bits##_t*>(p), v, __ATOMIC_SEQ_CST);               \
  }

#define SIMT_ATOMIC_EXCHANGE(bits, name, weak)                                                                 \
  extern "C" bool __tsan_atomic##bits##_compare_exchange_##name(volatile void* p, void* expected,              \
                                                                std::uint##bits##_t v, int, int) {             \
    return __atomic_compare_exchange_n(static_cast<volatile std::uint##bits##_t*>(p),                          \
                                       static_cast<std::uint##bits##_t*>(expected), v, weak, __ATOMIC_SEQ_CST, \
                                       __ATOMIC_SEQ_CST);                                                      \
  }

#define SIMT_ATOMICS(bits)                                                                                      \
  extern "C" std::uint##bits##_t __tsan_atomic##bits##_load(const volatile void* p, int) {                      \
    return __atomic_load_n(static_cast<const volatile std::uint##bits##_t*>(p), __ATOMIC_SEQ_CST);              \
  }                                                                                                             \
  extern "C" void __tsan_atomic##bits##_store(volatile void* p, std::uint##bits##_t v, int) {                   \
    __atomic_store_n(static_cast<volatile std::uint##bits##_t*>(p), v, __ATOMIC_SEQ_CST);                       \
  }                                                                                                             \
  extern "C" std::uint##bits##_t __tsan_atomic##bits##_exchange(volatile void* p, std::uint##bits##_t v, int) { \
    return __atomic_exchange_n(static_cast<volatile std::uint##bits##_t*>(p), v, __ATOMIC_SEQ_CST);             \
  }                                                                                                             \
  SIMT_ATOMIC_UPDATE(bits, fetch_add)                                                                           \
  SIMT_ATOMIC_UPDATE(bits, fetch_sub)                                                                           \
  SIMT_ATOMIC_UPDATE(bits, fetch_and)                                                                           \
  SIMT_ATOMIC_UPDATE(bits, fetch_or)                                                                            \
  SIMT_ATOMIC_UPDATE(bits, fetch_xor)                                                                           \
  SIMT_ATOMIC_EXCHANGE(bits, strong, false)                                                                     \
  SIMT_ATOMIC_EXCHANGE(bits, weak, true)

SIMT_ATOMICS(8)
SIMT_ATOMICS(16)
SIMT_ATOMICS(32)
SIMT_ATOMICS(64)
