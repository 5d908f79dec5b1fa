// A cache of memory for large outputs, on huge pages: what one output frees is kept for the next of its size.
//
// glibc maps every block above 32 MB afresh and unmaps it when it is freed, so that the system clears each page of a
// large output before it is written: for 103 MB 35 ms in pages of 4 KB, 15 ms in huge ones, where a copy takes 7.
// A block that is released here stays mapped. The system is told that its contents mean nothing (MADV_FREE) and takes
// the pages whenever it wants for something else; until then the next output of that size finds them ready.
#pragma once

#include <cstddef>

#include "parallel.h"

namespace bnext::cpu {

// Where malloc begins to map each block by itself; smaller ones mostly find memory that was in use before.
constexpr std::size_t kMinCachedBytes = std::size_t{32} << 20;

// A block of at least `bytes`, its contents unspecified, at an address that is a multiple of a huge page's size; null
// where the system has none.
void* allocate_block(std::size_t bytes);

// Releases what allocate_block returned.
void release_block(void* block);

// Writes to each huge page of [data, data + bytes), from all threads. A fresh page is cleared when it is first written
// to. Writing in order overwrites a page while it is in the cache; writing with strides would clear pages at
// the first strides, one after the other, and gains if they are clear by then (19 ms against 21 to 31, 103 MB channels
// first).
void touch_pages(void* data, std::size_t bytes, const Parallel& parallel);

// Released blocks are cached up to this many bytes together: BNEXT_CACHE_MB, 1024 if that is not set to a number.
std::size_t max_cached_bytes();
std::size_t cached_bytes();
void empty_cache();

// Whether blocks ask for huge pages: the system knows them, and BNEXT_HUGE_PAGES is not 0. Only a request: a system
// that refuses goes on with small ones.
bool huge_pages_enabled();

}  // namespace bnext::cpu
