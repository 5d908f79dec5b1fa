#define BNEXT_LEAVES "../reduce_columns.inl"
#include "avx2.inl"
