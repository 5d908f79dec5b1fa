#define BNEXT_KERNELS "../reduce_segments.inl"
#include "avx2.inl"
