#define BNEXT_LEAVES "../leaf_table.inl"
#include "avx2.inl"
