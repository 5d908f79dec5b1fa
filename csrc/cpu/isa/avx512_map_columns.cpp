#define BNEXT_LEAVES "../map_columns.inl"
#include "avx512.inl"
