// Per-channel vectors: parameters and running statistics, each in a dtype of its own, read and written as doubles.
#pragma once

#include <cstdint>

#include "dispatch.h"
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
  return dispatch(vector.dtype, [&](auto tag) {
    return to_double(static_cast<const typename decltype(tag)::Type*>(vector.data)[c]);
  });
}

BNEXT_INLINE void store(const MutableChannelVector& vector, std::int64_t c, double value) {
  dispatch(vector.dtype,
           [&](auto tag) { from_double(value, static_cast<typename decltype(tag)::Type*>(vector.data)[c]); });
}

}  // namespace bnext
