#define BNEXT_LEAVES "../map_segments.inl"
#include "avx2.inl"
