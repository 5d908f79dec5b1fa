// BNEXT_INLINE marks the functions that the innermost loops are made of.
#pragma once

// Always inlined, not only for speed: the CPU leaves are compiled several times for different instruction sets, and
// an out-of-line copy of a shared function, compiled for the newest, could be linked into all of them.
#define BNEXT_INLINE __attribute__((always_inline)) inline
