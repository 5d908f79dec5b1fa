// BNEXT_INLINE marks the functions that the innermost loops are made of, on the CPU and in CUDA kernels.
#pragma once

// Always inlined, not only for speed: the CPU kernels are compiled several times for different instruction sets, and
// an out-of-line copy of a shared function, compiled for the newest, could be linked into all of them.
#if defined(__CUDACC__)
#define BNEXT_INLINE __host__ __device__ __forceinline__
#else
#define BNEXT_INLINE __attribute__((always_inline)) inline
#endif
