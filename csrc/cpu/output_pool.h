// Memory for the outputs of a real model's layers, of some megabytes each: pieces of blocks of the huge-page cache.
//
// malloc has such outputs on its heap. Whenever 64 MB at the heap's top are free, malloc gives them back to the system,
// which clears them page by page for the next outputs: 50,000 page faults in a training step of DenseNet-121, a tenth
// of its time (docs/performance.md). A piece that is released here is joined with its free neighbours. The pool keeps
// one block whose pieces are all free; any other goes back to the cache, which offers it to the system.
#pragma once

#include <cstddef>

namespace bnext::cpu {

// From this size on outputs are pieces of blocks; from kMinCachedBytes on they are blocks of their own.
constexpr std::size_t kMinPooledBytes = std::size_t{1} << 18;

// A piece of at least `bytes`, aligned to 4 KB, its contents unspecified. Null where the system provides no block, and
// where BNEXT_CACHE_MB is less than a block, so that none would be cached.
void* allocate_piece(std::size_t bytes);

// Releases what allocate_piece returned.
void release_piece(void* piece);

// The bytes of the block whose pieces are all free, or 0.
std::size_t free_block_bytes();

// Gives that block back to the cache.
void empty_pool();

}  // namespace bnext::cpu
