// Stands in for the toolkit's header of this name: per-thread asynchronous copies (cp.async).
#pragma once

#include "cuda_runtime.h"

SIMT_DEVICE void __pipeline_memcpy_async(void* shared, const void* global, std::size_t size_and_align) {
  simt::async_copy(shared, global, size_and_align);
}
SIMT_DEVICE void __pipeline_commit() { simt::async_commit(); }
SIMT_DEVICE void __pipeline_wait_prior(unsigned groups_left) { simt::async_wait(groups_left); }
