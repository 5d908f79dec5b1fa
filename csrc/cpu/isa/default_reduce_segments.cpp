#define BNEXT_LEAVES "../reduce_segments.inl"
#include "default.inl"
