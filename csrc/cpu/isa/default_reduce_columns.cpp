#define BNEXT_LEAVES "../reduce_columns.inl"
#include "default.inl"
