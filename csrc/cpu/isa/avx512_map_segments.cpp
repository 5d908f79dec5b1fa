#define BNEXT_LEAVES "../map_segments.inl"
#include "avx512.inl"
