#define BNEXT_LEAVES "../leaf_table.inl"
#include "avx512.inl"
