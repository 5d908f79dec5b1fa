#define BNEXT_KERNELS "../map_segments.inl"
#include "default.inl"
