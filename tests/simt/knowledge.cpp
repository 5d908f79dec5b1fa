#include "knowledge.h"

#include <algorithm>
#include <iterator>

namespace simt {
namespace {

bool is_before(const Known& a, const Known& b) { return a.place < b.place; }

}  // namespace

KnowledgePtr with(const KnowledgePtr& base, const std::vector<Known>& entries) {
  std::vector<Known> all;
  if (base != nullptr) all = *base;
  const auto middle = all.insert(all.end(), entries.begin(), entries.end());
  std::inplace_merge(all.begin(), middle, all.end(), is_before);
  auto result = std::make_shared<std::vector<Known>>();
  Known block{};  // the last entry for a whole block: what it says already is left out
  for (const Known& known : all) {
    if (known.place >> 16 == block.place >> 16 && known.tick <= block.tick) continue;
    if ((known.place & 0xffff) == 0) block = known;
    if (!result->empty() && result->back().place == known.place) {
      result->back().tick = std::max(result->back().tick, known.tick);
    } else {
      result->push_back(known);
    }
  }
  return result;
}

KnowledgePtr join(const KnowledgePtr& a, const KnowledgePtr& b) {
  if (a == b || b == nullptr) return a;
  if (a == nullptr) return b;
  // The threads of a block join the same two one after the other.
  static KnowledgePtr last_a, last_b, last_result;
  if (a != last_a || b != last_b) {
    last_result = with(a, *b);
    last_a = a;
    last_b = b;
  }
  return last_result;
}

Tick tick_at(const KnowledgePtr& knowledge, Place place) {
  if (knowledge == nullptr) return 0;
  const auto found = std::lower_bound(knowledge->begin(), knowledge->end(), Known{place, 0}, is_before);
  return found != knowledge->end() && found->place == place ? found->tick : 0;
}

bool covers(const KnowledgePtr& knowledge, std::uint32_t block, unsigned thread, Tick tick) {
  return tick <= tick_at(knowledge, block_place(block)) || tick <= tick_at(knowledge, thread_place(block, thread));
}

}  // namespace simt
