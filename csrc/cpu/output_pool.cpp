#include "output_pool.h"

#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#if defined(__linux__)
#include <pthread.h>
#endif

#include "huge_page_cache.h"

namespace bnext::cpu {
namespace {

constexpr std::size_t kBlockBytes = std::size_t{64} << 20;
constexpr std::size_t kGranule = 4096;

class Pool {
 public:
  void* take(std::size_t bytes) {
    const std::size_t size = (bytes + kGranule - 1) / kGranule * kGranule;
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = free_.lower_bound({size, nullptr});
    if (found == free_.end()) {
      char* const block = static_cast<char*>(allocate_block(kBlockBytes));
      if (block == nullptr) return nullptr;
      pieces_[block] = {kBlockBytes, block, true};
      found = free_.insert({kBlockBytes, block}).first;
    }
    char* const data = found->second;
    free_.erase(found);
    Piece& piece = pieces_[data];
    if (piece.size > size) {
      pieces_[data + size] = {piece.size - size, piece.block, true};
      free_.insert({piece.size - size, data + size});
      piece.size = size;
    }
    piece.is_free = false;
    return data;
  }

  void give_back(void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto piece = pieces_.find(static_cast<char*>(data));
    piece->second.is_free = true;
    if (const auto next = std::next(piece); next != pieces_.end()) join(piece, next);
    if (piece != pieces_.begin()) {
      if (const auto before = std::prev(piece); join(before, piece)) piece = before;
    }
    // The pool keeps one block that is wholly free: otherwise a single layer would offer its block to the system after
    // each call and reclaim it at the next, which interrupts all threads.
    if (piece->second.size == kBlockBytes) release_free_block();
    free_.insert({piece->second.size, piece->first});
  }

  void empty() {
    const std::lock_guard<std::mutex> lock(mutex_);
    release_free_block();
  }

  std::size_t free_block_bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return free_block() == free_.end() ? 0 : kBlockBytes;
  }

  // A child would share the pages of a free block, so that the next write to them would have to copy them.
  void before_fork() {
    mutex_.lock();
    release_free_block();
  }
  void after_fork() { mutex_.unlock(); }

 private:
  struct Piece {
    std::size_t size;
    const char* block;
    bool is_free;
  };
  using Pieces = std::map<char*, Piece>;
  using Free = std::set<std::pair<std::size_t, char*>>;

  Free::iterator free_block() { return free_.lower_bound({kBlockBytes, nullptr}); }

  void release_free_block() {
    const auto found = free_block();
    if (found == free_.end()) return;
    release_block(found->second);
    pieces_.erase(found->second);
    free_.erase(found);
  }

  // Joins two neighbours if both are free and belong to the same block. Returns whether it did.
  bool join(Pieces::iterator left, Pieces::iterator right) {
    if (!left->second.is_free || !right->second.is_free || left->second.block != right->second.block) return false;
    free_.erase({left->second.size, left->first});
    free_.erase({right->second.size, right->first});
    left->second.size += right->second.size;
    pieces_.erase(right);
    return true;
  }

  std::mutex mutex_;
  Pieces pieces_;  // by address
  Free free_;      // by size
};

Pool& pool() {
  static Pool* const instance = [] {
    static Pool* const created = new Pool;
#if defined(__linux__)
    cached_bytes();  // registers the cache's handlers first: its lock is taken while this one is held
    pthread_atfork([] { created->before_fork(); }, [] { created->after_fork(); }, [] { created->after_fork(); });
#endif
    return created;
  }();
  return *instance;
}

}  // namespace

void* allocate_piece(std::size_t bytes) { return max_cached_bytes() < kBlockBytes ? nullptr : pool().take(bytes); }

void release_piece(void* piece) { pool().give_back(piece); }

std::size_t free_block_bytes() { return pool().free_block_bytes(); }

void empty_pool() { pool().empty(); }

}  // namespace bnext::cpu
