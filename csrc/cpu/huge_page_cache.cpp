#include "huge_page_cache.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <string>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace bnext::cpu {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kDefaultCacheMegabytes = 1024;

struct Block {
  void* data;
  std::size_t size;  // a multiple of kHugePage
};

#if defined(__linux__)

// Maps memory that is aligned to a huge page.
void* map(std::size_t size) {
  // One huge page more, so that an aligned address lies within the first; the ends beside the block are unmapped again.
  const std::size_t mapped = size + kHugePage;
  void* const start = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  const auto address = reinterpret_cast<std::uintptr_t>(start);
  const std::size_t before = (kHugePage - address % kHugePage) % kHugePage;
  char* const data = static_cast<char*>(start) + before;
  if (before != 0) munmap(start, before);
  munmap(data + size, kHugePage - before);
  madvise(data, size, huge_pages_enabled() ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  return data;
}

void unmap(const Block& block) { munmap(block.data, block.size); }

// False where the system does not support this: the block must not be cached then. A forked process must not share the
// pages, or the next output would have them copied on write, in small pages.
bool offer_to_system(const Block& block) {
  return madvise(block.data, block.size, MADV_WIPEONFORK) == 0 && madvise(block.data, block.size, MADV_FREE) == 0;
}

void reclaim(const Block& block) { madvise(block.data, block.size, MADV_KEEPONFORK); }

#else

void* map(std::size_t) { return nullptr; }
void unmap(const Block&) {}
bool offer_to_system(const Block&) { return false; }
void reclaim(const Block&) {}

#endif

class Blocks {
 public:
  void* take(std::size_t bytes) {
    const std::size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = smallest_fitting(size);
      if (found != cached_.end()) {
        const Block block = *found;
        cached_.erase(found);
        cached_bytes_ -= block.size;
        in_use_.push_back(block);
        reclaim(block);
        return block.data;
      }
    }
    void* data = map(size);
    if (data == nullptr) {
      shrink(0);
      data = map(size);
    }
    if (data == nullptr) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    in_use_.push_back({data, size});
    return data;
  }

  void give_back(void* data) {
    Block block{};
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = std::find_if(in_use_.begin(), in_use_.end(), [&](const Block& b) { return b.data == data; });
      block = *found;
      in_use_.erase(found);
    }
    if (block.size > max_cached_bytes() || !offer_to_system(block)) return unmap(block);
    const std::lock_guard<std::mutex> lock(mutex_);
    cached_.push_back(block);
    cached_bytes_ += block.size;
    drop_down_to(max_cached_bytes());
  }

  void shrink(std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    drop_down_to(bytes);
  }

  std::size_t cached_bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return cached_bytes_;
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  // Unmaps the blocks that were given back first, until at most `bytes` are cached.
  void drop_down_to(std::size_t bytes) {
    auto end = cached_.begin();
    for (; cached_bytes_ > bytes; ++end) {
      cached_bytes_ -= end->size;
      unmap(*end);
    }
    cached_.erase(cached_.begin(), end);
  }

  // Only blocks at most a quarter larger fit: the excess is wasted for as long as the output lives. Of several equal
  // ones, takes the block that was given back last, whose pages are the likeliest to be resident still.
  std::vector<Block>::iterator smallest_fitting(std::size_t size) {
    auto best = cached_.end();
    for (auto each = cached_.begin(); each != cached_.end(); ++each) {
      const bool fits = each->size >= size && each->size - size <= size / 4;
      if (fits && (best == cached_.end() || each->size <= best->size)) best = each;
    }
    return best;
  }

  std::mutex mutex_;
  std::vector<Block> cached_;  // in the order in which they were given back
  std::vector<Block> in_use_;
  std::size_t cached_bytes_ = 0;
};

// Never destroyed: tensors may outlive every static object that is.
Blocks& blocks() {
  static Blocks* const instance = [] {
    static Blocks* const created = new Blocks;
#if defined(__linux__)
    // A child that is forked while another thread holds the lock would wait for it for ever.
    pthread_atfork([] { created->lock(); }, [] { created->unlock(); }, [] { created->unlock(); });
#endif
    return created;
  }();
  return *instance;
}

bool system_has_huge_pages() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/enabled");
  std::string line;
  return std::getline(file, line) && line.find("[never]") == std::string::npos;
}

bool huge_pages_wanted() {
  const char* setting = std::getenv("BNEXT_HUGE_PAGES");
  return setting == nullptr || std::string(setting) != "0";
}

std::size_t cache_megabytes() {
  const char* setting = std::getenv("BNEXT_CACHE_MB");
  if (setting == nullptr || *setting < '0' || *setting > '9') return kDefaultCacheMegabytes;
  char* end = nullptr;
  const unsigned long long megabytes = std::strtoull(setting, &end, 10);
  const bool is_number = *end == '\0' && megabytes < (1ull << 40);
  return is_number ? static_cast<std::size_t>(megabytes) : kDefaultCacheMegabytes;
}

}  // namespace

void* allocate_block(std::size_t bytes) { return blocks().take(bytes); }

void release_block(void* block) { blocks().give_back(block); }

void touch_pages(void* data, std::size_t bytes, const Parallel& parallel) {
  const auto pages = static_cast<std::int64_t>((bytes + kHugePage - 1) / kHugePage);
  parallel(pages, [data](std::int64_t begin, std::int64_t end) {
    for (std::int64_t page = begin; page < end; ++page) {
      *(static_cast<volatile char*>(data) + static_cast<std::size_t>(page) * kHugePage) = 0;
    }
  });
}

std::size_t max_cached_bytes() {
  static const std::size_t bytes = cache_megabytes() << 20;
  return bytes;
}

std::size_t cached_bytes() { return blocks().cached_bytes(); }

void empty_cache() { blocks().shrink(0); }

bool huge_pages_enabled() {
  static const bool enabled = huge_pages_wanted() && system_has_huge_pages();
  return enabled;
}

}  // namespace bnext::cpu
