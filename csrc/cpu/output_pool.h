// Memory for the outputs of a real model's layers, of some megabytes each: pieces of blocks of the huge-page cache.
//
// malloc has them on its heap. Whenever 64 MB at its top are free it gives them back to the system, which clears them
// page by page for the next outputs: 50,000 page faults in a step of training of DenseNet-121, a tenth of its time
// (docs/performance.md). A piece that is released here is joined with the free ones beside it. A block whose pieces are
// all free goes back to the cache, which offers it to the system, but for one.
#pragma once

#include <cstddef>

namespace bnext::cpu {

// From where on outputs are pieces; from kMinCachedBytes on they are blocks of their own.
constexpr std::size_t kMinPooledBytes = std::size_t{1} << 18;

// At least `bytes`, contents unspecified, at an address that is a multiple of 4 KB. Null where the system has none, and
// where BNEXT_CACHE_MB is less than a block, so that nothing would be kept.
void* allocate_piece(std::size_t bytes);

// Releases what allocate_piece returned.
void release_piece(void* piece);

// Of the block whose pieces are all free, or 0.
std::size_t free_block_bytes();

// Gives that block back to the cache.
void empty_pool();

}  // namespace bnext::cpu
