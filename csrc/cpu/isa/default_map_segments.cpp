#define BNEXT_LEAVES "../map_segments.inl"
#include "default.inl"
