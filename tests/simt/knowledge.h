// What a thread knows to have happened: a vector clock, kept short.
//
// One counter ticks for the whole launch at every synchronisation, and an access carries its thread's tick. When all
// threads of a block meet, none of them has run since it arrived, so "everything this block did up to tick T" says
// what they learn of each other in one entry instead of one a thread.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace simt {

using Tick = std::uint64_t;

// A block or a thread of the launch. Ordered: a block comes before its threads.
using Place = std::uint64_t;
constexpr Place block_place(std::uint32_t block) { return Place{block} << 16; }
constexpr Place thread_place(std::uint32_t block, unsigned thread) { return block_place(block) | (thread + 1); }

struct Known {
  Place place;
  Tick tick;  // everything that happened there up to this tick
};

// Entries in the order of their places; null if nothing is known. Shared and never changed: the threads that left a
// barrier together have the same one, which makes joining cheap.
using KnowledgePtr = std::shared_ptr<const std::vector<Known>>;

KnowledgePtr join(const KnowledgePtr& a, const KnowledgePtr& b);
// The `entries` too must be in the order of their places.
KnowledgePtr with(const KnowledgePtr& base, const std::vector<Known>& entries);
Tick tick_at(const KnowledgePtr& knowledge, Place place);  // of the entry for this very place; 0 if there is none
bool covers(const KnowledgePtr& knowledge, std::uint32_t block, unsigned thread, Tick tick);

}  // namespace simt
