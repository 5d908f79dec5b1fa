// A cache of memory for large outputs, on huge pages: what one output frees is kept for the next of its size.
//
// glibc maps every block above 32 MB afresh and unmaps it when it is freed, so that the system clears each page of a
// large output before it is written: for 103 MB this takes 35 ms in pages of 4 KB and 15 ms in huge pages, where a copy
// takes 7. A block that is released here stays mapped. The system is told that it may discard the contents (MADV_FREE)
// and takes the pages as soon as it needs memory; until then the next output of that size finds them ready.
#pragma once

#include <cstddef>

#include "parallel.h"

namespace bnext::cpu {

// From this size on malloc maps each block by itself; smaller blocks mostly get memory that was in use before.
constexpr std::size_t kMinCachedBytes = std::size_t{32} << 20;

// A block of at least `bytes`, aligned to a huge page, its contents unspecified; null where the system provides none.
void* allocate_block(std::size_t bytes);

// Releases what allocate_block returned.
void release_block(void* block);

// Writes to each huge page of [data, data + bytes), from all threads: the system clears a fresh page at the first write
// to it. A kernel that writes in order needs no such call, as it overwrites a page while that is still in the cache.
// One that writes with strides would have all pages cleared by its first strides, one page after the other, and gains
// if they are cleared before (19 ms against 21 to 31, 103 MB channels first).
void touch_pages(void* data, std::size_t bytes, const Parallel& parallel);

// Released blocks are cached up to this many bytes together: BNEXT_CACHE_MB, 1024 if that is not set to a number.
std::size_t max_cached_bytes();
std::size_t cached_bytes();
void empty_cache();

// Whether blocks request huge pages: the system supports them, and BNEXT_HUGE_PAGES is not 0. A system that refuses the
// request uses small pages.
bool huge_pages_enabled();

}  // namespace bnext::cpu
