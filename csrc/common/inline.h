// BNEXT_INLINE marks the functions that the innermost loops are made of, on the CPU and in CUDA kernels;
// BNEXT_NO_UNROLL stands before a loop that unrolled would not fit into a CUDA thread's registers.
#pragma once

// Always inlined, not only for speed: the CPU kernels are compiled several times for different instruction sets, and
// an out-of-line copy of a shared function, compiled for the newest, could be linked into all of them.
#if defined(__CUDACC__)
#define BNEXT_INLINE __host__ __device__ __forceinline__
#define BNEXT_NO_UNROLL _Pragma("unroll 1")
#else
#define BNEXT_INLINE __attribute__((always_inline)) inline
#define BNEXT_NO_UNROLL
#endif
