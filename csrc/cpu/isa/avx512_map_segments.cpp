#define BNEXT_KERNELS "../map_segments.inl"
#include "avx512.inl"
