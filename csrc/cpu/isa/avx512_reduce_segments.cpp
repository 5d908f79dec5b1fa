#define BNEXT_KERNELS "../reduce_segments.inl"
#include "avx512.inl"
