#define BNEXT_LEAVES "../leaf_table.inl"
#include "default.inl"
