// Sixteen bytes of elements: loaded and stored as one word where memory allows, widened to compute with.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../common/elementwise.h"
#include "../common/half.h"
#include "launch_plan.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace bnext::cuda {

template <typename scalar_t>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(scalar_t));

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(BFloat16 value) { return to_float(value); }

// One instruction each on the device, with the roundings of common/half.h.
#if defined(__CUDACC__)
__device__ __forceinline__ float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ void narrow(float value, Half& result) {
  result.bits = __half_as_ushort(__float2half_rn(value));
}
__device__ __forceinline__ void narrow(float value, BFloat16& result) {
  result.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
#else
__device__ __forceinline__ float widen(Half value) { return to_float(value); }
__device__ __forceinline__ void narrow(float value, Half& result) { result = to_half(value); }
__device__ __forceinline__ void narrow(float value, BFloat16& result) { result = to_bfloat16(value); }
#endif
__device__ __forceinline__ void narrow(float value, float& result) { result = value; }
__device__ __forceinline__ void narrow(double value, double& result) { result = value; }
// float64 stands in where float32 is too narrow; what does not fit is rounded twice.
template <typename scalar_t>
__device__ __forceinline__ void narrow(double value, scalar_t& result) {
  narrow(static_cast<float>(value), result);
}

template <typename scalar_t>
struct alignas(kVectorBytes) Vec {
  scalar_t lane[kLanes<scalar_t>];
};

// The vectors of each input at one place, as elementwise.h counts them, and that place's bits of a mask.
template <typename scalar_t>
struct Item {
  Vec<scalar_t> vec[kMaxInputs];
  unsigned bits;
};

// What the functor reads of lane e.
template <typename Functor, typename scalar_t, typename acc_t>
__device__ __forceinline__ void widen_lane(const Item<scalar_t>& item, int e, const Epilogue& epilogue,
                                           acc_t (&in)[kMaxInputs]) {
  if (Functor::kReadsInput) in[0] = static_cast<acc_t>(widen(item.vec[0].lane[e]));
  if (Functor::kReadsGrad) in[1] = static_cast<acc_t>(widen(item.vec[1].lane[e]));
  if (Functor::kActivated) {
    in[2] =
        epilogue.has_mask ? static_cast<acc_t>(item.bits >> e & 1u) : static_cast<acc_t>(widen(item.vec[2].lane[e]));
  }
}

// Which lanes of the vector at element `offset` belong to the tile: [low, high). `whole`: all of them, and the vector
// can be moved as one word.
struct Segment {
  std::int64_t offset;
  std::int64_t mask;  // the byte that a mask has for it
  int low;
  int high;
  bool whole;
};

template <typename scalar_t>
__device__ __forceinline__ Vec<scalar_t> as_vec(const uint4& word) {
  Vec<scalar_t> vec;
  __builtin_memcpy(&vec, &word, kVectorBytes);
  return vec;
}

template <typename scalar_t>
__device__ __forceinline__ uint4 as_word(const Vec<scalar_t>& vec) {
  uint4 word;
  __builtin_memcpy(&word, &vec, kVectorBytes);
  return word;
}

// Lanes outside the segment are zero, and not read.
template <typename scalar_t>
__device__ __forceinline__ Vec<scalar_t> load_lanes(const scalar_t* data, const Segment& segment) {
  Vec<scalar_t> vec = as_vec<scalar_t>(uint4{0, 0, 0, 0});
#pragma unroll
  for (int e = 0; e < kLanes<scalar_t>; ++e) {
    if (e >= segment.low && e < segment.high) vec.lane[e] = data[segment.offset + e];
  }
  return vec;
}

// Outputs are written once and not read again here: they should not push what will be read out of L2.
template <typename scalar_t>
__device__ __forceinline__ void store_vec(scalar_t* data, const Segment& segment, const Vec<scalar_t>& vec) {
  if (segment.whole) {
    __stcs(reinterpret_cast<uint4*>(data + segment.offset), as_word(vec));
    return;
  }
#pragma unroll
  for (int e = 0; e < kLanes<scalar_t>; ++e) {
    if (e >= segment.low && e < segment.high) data[segment.offset + e] = vec.lane[e];
  }
}

}  // namespace bnext::cuda
