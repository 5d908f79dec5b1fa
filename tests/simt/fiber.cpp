#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>
#include <vector>

namespace simt {
namespace {

// Stacks are kept: a launch may start tens of thousands of threads, and few are alive at a time.
std::vector<std::uintptr_t>& idle_stacks() {
  static auto& stacks = *new std::vector<std::uintptr_t>;
  return stacks;
}

std::uintptr_t take_stack() {
  if (!idle_stacks().empty()) {
    const std::uintptr_t stack = idle_stacks().back();
    idle_stacks().pop_back();
    return stack;
  }
  // A page that nobody may touch lies below the stack: overflowing it stops the program there and then.
  const auto guard = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* const mapping = mmap(nullptr, guard + Fiber::kStackBytes, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mprotect(mapping, guard, PROT_NONE);
  return reinterpret_cast<std::uintptr_t>(mapping) + guard;
}

}  // namespace

void Fiber::release() {
  if (stack_ != 0) idle_stacks().push_back(stack_);
  stack_ = 0;
}

#if defined(__x86_64__)

// Saves what a call must preserve on the stack it leaves and takes the same from the stack it enters. Rounding modes
// and the signal mask are not switched: kernels leave them alone, and for the mask ucontext needs a system call.
extern "C" void simt_switch_stack(void** leave, void* enter);
extern "C" void simt_enter_fiber();
asm(R"(
.text
.type simt_switch_stack, @function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack, . - simt_switch_stack
.type simt_enter_fiber, @function
simt_enter_fiber:
  movq %r13, %rdi
  call *%r12
  ud2
.size simt_enter_fiber, . - simt_enter_fiber
)");

void Fiber::start(Entry entry, void* argument) {
  if (stack_ == 0) stack_ = take_stack();
  // What simt_switch_stack pops on the first resume. Two words stay above the return address: then the stack is
  // aligned to 16 bytes at the call of `entry`, as the ABI demands.
  auto** top = reinterpret_cast<void**>(stack_ + kStackBytes);
  *--top = nullptr;
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&simt_enter_fiber);
  *--top = nullptr;                         // rbp
  *--top = nullptr;                         // rbx
  *--top = reinterpret_cast<void*>(entry);  // r12
  *--top = argument;                        // r13
  *--top = nullptr;                         // r14
  *--top = nullptr;                         // r15
  fiber_top_ = top;
}

void Fiber::resume() { simt_switch_stack(&resumer_top_, fiber_top_); }
void Fiber::suspend() { simt_switch_stack(&fiber_top_, resumer_top_); }

#else

namespace {

// makecontext passes ints only.
void enter_fiber(unsigned entry_high, unsigned entry_low, unsigned argument_high, unsigned argument_low) {
  const auto join = [](unsigned high, unsigned low) { return (std::uint64_t{high} << 32) | low; };
  const auto entry = reinterpret_cast<Fiber::Entry>(join(entry_high, entry_low));
  entry(reinterpret_cast<void*>(join(argument_high, argument_low)));
}

}  // namespace

void Fiber::start(Entry entry, void* argument) {
  if (stack_ == 0) stack_ = take_stack();
  getcontext(&fiber_context_);
  fiber_context_.uc_stack.ss_sp = reinterpret_cast<void*>(stack_);
  fiber_context_.uc_stack.ss_size = kStackBytes;
  fiber_context_.uc_link = nullptr;
  const auto e = reinterpret_cast<std::uint64_t>(entry);
  const auto a = reinterpret_cast<std::uint64_t>(argument);
  makecontext(&fiber_context_, reinterpret_cast<void (*)()>(&enter_fiber), 4, static_cast<unsigned>(e >> 32),
              static_cast<unsigned>(e), static_cast<unsigned>(a >> 32), static_cast<unsigned>(a));
}

void Fiber::resume() { swapcontext(&resumer_context_, &fiber_context_); }
void Fiber::suspend() { swapcontext(&fiber_context_, &resumer_context_); }

#endif

}  // namespace simt
