#define BNEXT_LEAVES "../reduce_segments.inl"
#include "avx512.inl"
