// Who knows what: the checker's side of each synchronisation.
#pragma once

#include "machine.h"

namespace simt {

void adopt(Thread& thread, const KnowledgePtr& knowledge);  // instead of what it knew
void learn(Thread& thread, const KnowledgePtr& knowledge);  // besides

// Whether what `record` says happened before what `thread` does now.
bool happened_before(const Thread& thread, const Record& record);

void fence_clock(Thread& thread, Scope scope);
// An atomic read or write at `address`: what fences, before or after it, make of it.
void observe(Thread& thread, Region& region, std::uintptr_t address, Order order);
void publish(Thread& thread, Region& region, std::uintptr_t address, Order order, bool is_update);

}  // namespace simt
