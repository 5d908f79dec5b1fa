// What a thread knows to have happened: a vector clock, kept short.
//
// One counter ticks for the whole launch at every synchronisation, and an access carries its thread's tick. When all
// threads of a block meet, none of them has run since it arrived, so "everything this block did up to tick T" says
// what they learn of each other in one entry instead of one a thread. The same holds for a warp and for the grid.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace simt {

using Tick = std::uint64_t;

// A block, a warp or a thread of the launch. Ordered: a block comes before its warps, a warp before its threads.
using Place = std::uint64_t;
constexpr Place block_place(std::uint32_t block) { return Place{block} << 16; }
constexpr Place warp_place(std::uint32_t block, unsigned thread) {
  return block_place(block) | ((thread / 32 + 1) << 6);
}
constexpr Place thread_place(std::uint32_t block, unsigned thread) {
  return warp_place(block, thread) | (thread % 32 + 1);
}

struct Known {
  Place place;
  Tick tick;  // everything that happened there up to this tick
};

class Knowledge;
// Shared and never changed: the threads that left a barrier together have the same one, which makes joining cheap.
using KnowledgePtr = std::shared_ptr<const Knowledge>;

class Knowledge {
 public:
  explicit Knowledge(Tick everywhere) : everywhere_(everywhere) {}

  // Either may be null: nothing is known.
  static KnowledgePtr join(const KnowledgePtr& a, const KnowledgePtr& b);
  // `entries` in the order of their places.
  static KnowledgePtr with(const KnowledgePtr& base, const std::vector<Known>& entries);

  Tick everywhere() const { return everywhere_; }
  Tick at(Place place) const;  // by an entry for this very place
  bool covers(std::uint32_t block, unsigned thread, Tick tick) const;

 private:
  static KnowledgePtr merged(Tick everywhere, const std::vector<Known>& a, const std::vector<Known>& b);

  Tick everywhere_;
  std::vector<Known> entries_;
};

}  // namespace simt
