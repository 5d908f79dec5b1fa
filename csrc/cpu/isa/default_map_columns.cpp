#define BNEXT_LEAVES "../map_columns.inl"
#include "default.inl"
