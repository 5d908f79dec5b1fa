#define BNEXT_LEAVES "../map_columns.inl"
#include "avx2.inl"
