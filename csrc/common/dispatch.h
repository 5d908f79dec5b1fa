// From a dtype that is known at run time to a type that is known at compile time: the one switch over dtypes.
#pragma once

#include "half.h"
#include "inline.h"
#include "problem.h"

namespace bnext {

template <typename T>
struct TypeTag {
  using Type = T;
};

// f(TypeTag<T>()) with the T of `dtype`; f returns the same type for every T. f may be a __host__ function, which nvcc
// would not let a __host__ __device__ function call: hence the pragma.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <typename F>
BNEXT_INLINE auto dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32: return f(TypeTag<float>());
    case DType::kFloat64: return f(TypeTag<double>());
    case DType::kFloat16: return f(TypeTag<Half>());
    case DType::kBFloat16: return f(TypeTag<BFloat16>());
  }
  __builtin_unreachable();
}

}  // namespace bnext
