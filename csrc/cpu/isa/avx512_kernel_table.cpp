#define BNEXT_KERNELS "../kernel_table.inl"
#include "avx512.inl"
