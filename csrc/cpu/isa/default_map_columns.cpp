#define BNEXT_KERNELS "../map_columns.inl"
#include "default.inl"
