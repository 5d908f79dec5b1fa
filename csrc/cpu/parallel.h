// A parallel loop that the caller supplies: the kernels run on the caller's threads and need no thread library.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace bnext::cpu {

class Parallel {
 public:
  using Body = void (*)(void* context, std::int64_t begin, std::int64_t end);
  using Loop = void (*)(std::int64_t tasks, Body body, void* context);

  // `loop` calls `body` on disjoint ranges that cover [0, tasks), possibly concurrently, and returns when all are done.
  // `threads`: on how many, at most.
  Parallel(Loop loop, std::int64_t threads) : loop_(loop), threads_(threads) {}

  static Parallel serial() { return Parallel(nullptr, 1); }

  std::int64_t threads() const { return threads_; }

  template <typename F>
  void operator()(std::int64_t tasks, F&& f) const {
    using Function = std::remove_reference_t<F>;
    if (loop_ == nullptr) return f(std::int64_t{0}, tasks);
    loop_(
        tasks,
        [](void* context, std::int64_t begin, std::int64_t end) { (*static_cast<Function*>(context))(begin, end); },
        const_cast<void*>(static_cast<const void*>(&f)));
  }

 private:
  Loop loop_;
  std::int64_t threads_;
};

constexpr std::int64_t kEnoughTasks = 16;  // fewer cannot be shared out evenly, unless they are a power of two

constexpr std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// How much of n each of so many tasks takes, so that they are even. Few tasks become the next power of two: threads
// mostly are one, and so share them evenly.
constexpr std::int64_t even_share(std::int64_t n, std::int64_t tasks) {
  std::int64_t power = 1;
  while (power < tasks) power *= 2;
  return divide_up(n, tasks < kEnoughTasks ? power : tasks);
}

}  // namespace bnext::cpu
