// Large outputs on huge pages: a fresh 100 MB output is 25,000 page faults of 4 KB, which cost several times the
// batch norm itself.
#pragma once

#include <cstddef>

namespace bnext::cpu {

// Asks the kernel to back [data, data + bytes) with huge pages, if it is large enough to profit. A request, never an
// error: a system that refuses or knows no such thing goes on with small pages. BNEXT_HUGE_PAGES=0 turns it off.
void advise_huge_pages(void* data, std::size_t bytes);

// Whether the calls above have an effect here: not turned off, and supported by the system.
bool huge_pages_enabled();

}  // namespace bnext::cpu
