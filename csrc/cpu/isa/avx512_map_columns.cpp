#define BNEXT_KERNELS "../map_columns.inl"
#include "avx512.inl"
