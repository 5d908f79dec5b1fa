#define BNEXT_KERNELS "../reduce_segments.inl"
#include "default.inl"
