#define BNEXT_KERNELS "../reduce_columns.inl"
#include "avx512.inl"
