// A block's shared memory, laid out as the plan says.
#pragma once

#include <cuda_runtime.h>

#include "launch_plan.h"

namespace bnext::cuda {

// Pointers into a block's shared memory.
struct Shared {
  unsigned char* base;
  void* columns;
  double* merge;
  double* own;
  double* total;
  double* shift;
  double* coefficients;
  int* needs_fp64;

  __device__ __forceinline__ Shared(const SharedLayout& layout, unsigned char* base)
      : base(base),
        columns(base + layout.columns),
        merge(reinterpret_cast<double*>(base + layout.merge)),
        own(reinterpret_cast<double*>(base + layout.own)),
        total(reinterpret_cast<double*>(base + layout.total)),
        shift(reinterpret_cast<double*>(base + layout.shift)),
        coefficients(reinterpret_cast<double*>(base + layout.coefficients)),
        needs_fp64(reinterpret_cast<int*>(base + layout.needs_fp64)) {}
};

}  // namespace bnext::cuda
