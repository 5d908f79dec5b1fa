// A thread of execution that one OS thread switches to and from: each CUDA thread is one.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

class Fiber {
 public:
  using Entry = void (*)(void* argument);

  Fiber() = default;
  ~Fiber() { release(); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // `entry` must not return: it suspends for the last time.
  void start(Entry entry, void* argument);
  // Gives the stack to others, whatever is on it: the fiber must not be resumed any more.
  void release();
  void resume();   // returns when the fiber suspends
  void suspend();  // called on the fiber; returns when it is resumed

  bool on_stack(std::uintptr_t address) const { return address - stack_ < kStackBytes; }

  static constexpr std::size_t kStackBytes = 64 * 1024;

 private:
  std::uintptr_t stack_ = 0;  // lowest address
#if defined(__x86_64__)
  void* fiber_top_ = nullptr;
  void* resumer_top_ = nullptr;
#else
  ucontext_t fiber_context_;
  ucontext_t resumer_context_;
#endif
};

}  // namespace simt
