#define BNEXT_KERNELS "../kernel_table.inl"
#include "default.inl"
