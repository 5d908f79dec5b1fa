#define BNEXT_KERNELS "../kernel_table.inl"
#include "avx2.inl"
