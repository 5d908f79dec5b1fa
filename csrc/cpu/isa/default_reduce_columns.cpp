#define BNEXT_KERNELS "../reduce_columns.inl"
#include "default.inl"
