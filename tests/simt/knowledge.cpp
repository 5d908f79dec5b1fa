#include "knowledge.h"

#include <algorithm>

namespace simt {
namespace {

constexpr Place block_of(Place place) { return place >> 16; }
constexpr Place warp_of(Place place) { return place >> 6; }
constexpr bool is_block(Place place) { return (place & 0xffff) == 0; }
constexpr bool is_warp(Place place) { return (place & 0x3f) == 0; }

// Appends in order, and leaves out what an enclosing place says already.
class Builder {
 public:
  Builder(Tick everywhere, std::vector<Known>& entries) : everywhere_(everywhere), entries_(entries) {}

  void add(const Known& known) {
    if (block_of(known.place) != block_of(block_.place)) block_ = {known.place, everywhere_};
    if (warp_of(known.place) != warp_of(warp_.place)) warp_ = {known.place, block_.tick};
    if (known.tick <= std::max(block_.tick, warp_.tick)) return;
    if (is_block(known.place)) {
      block_ = known;
    } else if (is_warp(known.place)) {
      warp_ = known;
    }
    entries_.push_back(known);
  }

 private:
  Tick everywhere_;
  std::vector<Known>& entries_;
  Known block_{~Place{0}, 0};  // the one that encloses what is added next
  Known warp_{~Place{0}, 0};
};

}  // namespace

KnowledgePtr Knowledge::merged(Tick everywhere, const std::vector<Known>& a, const std::vector<Known>& b) {
  auto result = std::make_shared<Knowledge>(everywhere);
  result->entries_.reserve(a.size() + b.size());
  Builder builder(everywhere, result->entries_);
  auto left = a.begin();
  auto right = b.begin();
  while (left != a.end() || right != b.end()) {
    if (right == b.end() || (left != a.end() && left->place < right->place)) {
      builder.add(*left++);
    } else if (left == a.end() || right->place < left->place) {
      builder.add(*right++);
    } else {
      builder.add({left->place, std::max(left->tick, right->tick)});
      ++left;
      ++right;
    }
  }
  return result;
}

KnowledgePtr Knowledge::join(const KnowledgePtr& a, const KnowledgePtr& b) {
  if (a == b || b == nullptr) return a;
  if (a == nullptr) return b;
  // The threads of a block join the same two one after the other.
  thread_local KnowledgePtr last_a, last_b, last_result;
  if (a != last_a || b != last_b) {
    last_result = merged(std::max(a->everywhere_, b->everywhere_), a->entries_, b->entries_);
    last_a = a;
    last_b = b;
  }
  return last_result;
}

KnowledgePtr Knowledge::with(const KnowledgePtr& base, const std::vector<Known>& entries) {
  return merged(base->everywhere_, base->entries_, entries);
}

Tick Knowledge::at(Place place) const {
  const auto found = std::lower_bound(entries_.begin(), entries_.end(), place,
                                      [](const Known& known, Place wanted) { return known.place < wanted; });
  return found != entries_.end() && found->place == place ? found->tick : 0;
}

bool Knowledge::covers(std::uint32_t block, unsigned thread, Tick tick) const {
  return tick <= everywhere_ || tick <= at(block_place(block)) || tick <= at(warp_place(block, thread)) ||
         tick <= at(thread_place(block, thread));
}

}  // namespace simt
