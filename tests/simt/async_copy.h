// Asynchronous copies: nothing lands before the wait that covers it, which is as late as the device may be.
#pragma once

#include "machine.h"

namespace simt {

void issue_copy(Thread& thread, const AsyncCopy& copy);
void commit_copies(Thread& thread);
void wait_for_copies(Thread& thread, std::size_t groups_left, Site site);
// A thread must wait for what it started.
void check_no_copies(Thread& thread);

}  // namespace simt
