// Large outputs on huge pages: a fresh 100 MB output is 25,000 page faults of 4 KB, which cost several times the
// batch norm itself.
#pragma once

#include <cstddef>

#include "parallel.h"

namespace bnext::cpu {

// Asks the system to back [data, data + bytes) with huge pages, if it is large enough to profit. A request, never an
// error: a system that refuses or knows no such thing goes on with small pages. BNEXT_HUGE_PAGES=0 turns it off.
// The memory's contents are unspecified afterwards.
//
// A fresh page is cleared when it is first written to. Whoever writes in order overwrites it while it is still in the
// cache, and should leave `touch` null; a writer that jumps about clears pages at its first jumps, one after the
// other, and gains if all threads of `touch` clear them first (19 ms against 21 to 31, 103 MB channels first).
void use_huge_pages(void* data, std::size_t bytes, const Parallel* touch);

// Whether the calls above have an effect here: not turned off, and supported by the system.
bool huge_pages_enabled();

}  // namespace bnext::cpu
