// Per-channel vectors: parameters and running statistics, each in a dtype of its own, as doubles.
#pragma once

#include <cstdint>

#include "half.h"
#include "problem.h"

namespace bnext {

// A dense vector of length C; data is null where the caller has none.
struct ChannelVector {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};

struct MutableChannelVector {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
};

BNEXT_INLINE double load(const ChannelVector& vector, std::int64_t c) {
  switch (vector.dtype) {
    case DType::kFloat32: return static_cast<const float*>(vector.data)[c];
    case DType::kFloat64: return static_cast<const double*>(vector.data)[c];
    case DType::kFloat16: return to_float(static_cast<const Half*>(vector.data)[c]);
    case DType::kBFloat16: return to_float(static_cast<const BFloat16*>(vector.data)[c]);
  }
  __builtin_unreachable();
}

BNEXT_INLINE void store(const MutableChannelVector& vector, std::int64_t c, double value) {
  const auto single = static_cast<float>(value);
  switch (vector.dtype) {
    case DType::kFloat32: static_cast<float*>(vector.data)[c] = single; return;
    case DType::kFloat64: static_cast<double*>(vector.data)[c] = value; return;
    case DType::kFloat16: static_cast<Half*>(vector.data)[c] = to_half(single); return;
    case DType::kBFloat16: static_cast<BFloat16*>(vector.data)[c] = to_bfloat16(single); return;
  }
  __builtin_unreachable();
}

}  // namespace bnext
