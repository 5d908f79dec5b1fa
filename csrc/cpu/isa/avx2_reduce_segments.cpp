#define BNEXT_LEAVES "../reduce_segments.inl"
#include "avx2.inl"
