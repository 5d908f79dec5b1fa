#define BNEXT_KERNELS "../reduce_columns.inl"
#include "avx2.inl"
