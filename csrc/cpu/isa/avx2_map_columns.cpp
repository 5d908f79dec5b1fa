#define BNEXT_KERNELS "../map_columns.inl"
#include "avx2.inl"
