// Memory of large outputs: on huge pages, and kept for the next output of that size.
//
// glibc maps every block above 32 MB afresh and unmaps it when it is freed, so that the system clears each page of a
// large output before it is written: for 103 MB 35 ms in pages of 4 KB, 15 ms in huge ones, where a copy takes 7.
// A block given back here stays mapped. The system is told that its contents mean nothing (MADV_FREE) and takes the
// pages whenever it wants for something else; until then the next output of that size finds them ready.
#pragma once

#include <cstddef>

#include "parallel.h"

namespace bnext::cpu {

// Where malloc begins to map each block by itself; smaller ones mostly find memory that was in use before.
constexpr std::size_t kMinLargeBlock = std::size_t{32} << 20;

// A block of at least `bytes`, its contents unspecified, at an address that is a multiple of a huge page's size; null
// where the system has none.
void* take_block(std::size_t bytes);

// Gives back what take_block returned.
void give_back_block(void* block);

// Writes to each huge page of [data, data + bytes), from all threads. A fresh page is cleared when it is first written
// to. Whoever writes in order overwrites it while it is in the cache; a writer that jumps about would clear pages at
// its first jumps, one after the other, and gains if they are clear by then (19 ms against 21 to 31, 103 MB channels
// first).
void touch_pages(void* data, std::size_t bytes, const Parallel& parallel);

// Blocks given back are kept up to this many bytes together: BNEXT_KEEP_MB, 1024 if that is not set to a number.
std::size_t most_kept_bytes();
std::size_t kept_bytes();
void release_kept_blocks();

// Whether blocks ask for huge pages: the system knows them, and BNEXT_HUGE_PAGES is not 0. Only a request: a system
// that refuses goes on with small ones.
bool huge_pages_enabled();

}  // namespace bnext::cpu
