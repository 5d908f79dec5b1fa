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
    if (piece->second.size == kBlockBytes) {
      release_block(piece->first);
      pieces_.erase(piece);
    } else {
      free_.insert({piece->second.size, piece->first});
    }
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  struct Piece {
    std::size_t size;
    const char* block;
    bool is_free;
  };
  using Pieces = std::map<char*, Piece>;

  // Makes one of two neighbours, where both are free and of the same block.
  bool join(Pieces::iterator left, Pieces::iterator right) {
    if (!left->second.is_free || !right->second.is_free || left->second.block != right->second.block) return false;
    free_.erase({left->second.size, left->first});
    free_.erase({right->second.size, right->first});
    left->second.size += right->second.size;
    pieces_.erase(right);
    return true;
  }

  std::mutex mutex_;
  Pieces pieces_;                                 // by address
  std::set<std::pair<std::size_t, char*>> free_;  // by size
};

Pool& pool() {
  static Pool* const instance = [] {
    static Pool* const created = new Pool;
#if defined(__linux__)
    cached_bytes();  // whose lock is taken with this one held, so that it must be registered first
    pthread_atfork([] { created->lock(); }, [] { created->unlock(); }, [] { created->unlock(); });
#endif
    return created;
  }();
  return *instance;
}

}  // namespace

void* allocate_piece(std::size_t bytes) { return max_cached_bytes() < kBlockBytes ? nullptr : pool().take(bytes); }

void release_piece(void* piece) { pool().give_back(piece); }

}  // namespace bnext::cpu
