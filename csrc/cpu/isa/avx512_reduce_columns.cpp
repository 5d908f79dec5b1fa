#define BNEXT_LEAVES "../reduce_columns.inl"
#include "avx512.inl"
