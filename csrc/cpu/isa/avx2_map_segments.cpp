#define BNEXT_KERNELS "../map_segments.inl"
#include "avx2.inl"
