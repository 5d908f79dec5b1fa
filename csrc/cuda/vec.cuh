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

// Whether elements are computed in their opmath_t, as nearly all are, or in float64 where float32 is too narrow.
template <typename scalar_t, typename acc_t>
constexpr bool kIsOpmath = std::is_same_v<acc_t, opmath_t<scalar_t>>;

// Conversions of one element, and of two 16-bit ones in a register: one or two instructions on the device, with the
// rounding of common/half.h.
__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(BFloat16 value) { return to_float(value); }
__device__ __forceinline__ float2 widen_pair(unsigned word, BFloat16) {
  return {__builtin_bit_cast(float, word << 16), __builtin_bit_cast(float, word & 0xffff0000u)};
}
#if defined(__CUDACC__)
template <typename To, typename From>
__device__ __forceinline__ To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}
__device__ __forceinline__ float widen(Half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ __forceinline__ float2 widen_pair(unsigned word, Half) { return __half22float2(same_bits<__half2>(word)); }
__device__ __forceinline__ unsigned narrow_pair(float low, float high, Half) {
  return same_bits<unsigned>(__floats2half2_rn(low, high));
}
__device__ __forceinline__ unsigned narrow_pair(float low, float high, BFloat16) {
  return same_bits<unsigned>(__floats2bfloat162_rn(low, high));
}
// The bits of a result of float32 arithmetic as an integer: the device sets no sign bit in a NaN.
__device__ __forceinline__ int unsigned_nan_bits(float result) { return __float_as_int(result); }
// Both integers saturated to two bits, [-2, 1]: `low` in bits 0 and 1, `high` in bits 2 and 3, `above` shifted up by 4.
__device__ __forceinline__ unsigned saturate_pair(int high, int low, unsigned above) {
  unsigned packed;
  asm("cvt.pack.sat.s2.s32.b32 %0, %1, %2, %3;" : "=r"(packed) : "r"(high), "r"(low), "r"(above));
  return packed;
}
#else
__device__ __forceinline__ float widen(Half value) { return to_float(value); }
__device__ __forceinline__ float2 widen_pair(unsigned word, Half) {
  return {to_float(Half{static_cast<std::uint16_t>(word)}), to_float(Half{static_cast<std::uint16_t>(word >> 16)})};
}
__device__ __forceinline__ unsigned narrow_pair(float low, float high, Half) {
  return to_half(low).bits | static_cast<unsigned>(to_half(high).bits) << 16;
}
__device__ __forceinline__ unsigned narrow_pair(float low, float high, BFloat16) {
  return to_bfloat16(low).bits | static_cast<unsigned>(to_bfloat16(high).bits) << 16;
}
__device__ __forceinline__ int unsigned_nan_bits(float result) {
  return result == result ? __builtin_bit_cast(int, result) : 0x7fffffff;
}
__device__ __forceinline__ unsigned saturate_pair(int high, int low, unsigned above) {
  const auto bits = [](int value) { return static_cast<unsigned>(value < -2 ? -2 : value > 1 ? 1 : value) & 3u; };
  return above << 4 | bits(high) << 2 | bits(low);
}
#endif

struct Words {
  unsigned word[kVectorBytes / sizeof(unsigned)];
};

// A vector's lanes, widened. narrow_lanes is the inverse.
template <typename scalar_t>
__device__ __forceinline__ void widen_lanes(const Words& vec, opmath_t<scalar_t> (&lanes)[kLanes<scalar_t>]) {
  if constexpr (sizeof(scalar_t) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = widen_pair(vec.word[i], scalar_t{});
      lanes[2 * i] = pair.x;
      lanes[2 * i + 1] = pair.y;
    }
  } else if constexpr (sizeof(scalar_t) == 4) {
#pragma unroll
    for (int e = 0; e < 4; ++e) lanes[e] = __builtin_bit_cast(float, vec.word[e]);
  } else {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const std::uint64_t bits = vec.word[2 * e] | static_cast<std::uint64_t>(vec.word[2 * e + 1]) << 32;
      lanes[e] = __builtin_bit_cast(double, bits);
    }
  }
}

// Returns the first lane, widened, and rotates the vector by one lane: the first lane becomes the last.
template <typename scalar_t>
__device__ __forceinline__ opmath_t<scalar_t> take_lane(Words& vec) {
  opmath_t<scalar_t> lanes[kLanes<scalar_t>];
  widen_lanes<scalar_t>(vec, lanes);
  const Words old = vec;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(scalar_t) == 2) {
      vec.word[i] = old.word[i] >> 16 | old.word[(i + 1) % 4] << 16;
    } else {
      vec.word[i] = old.word[(i + sizeof(scalar_t) / 4) % 4];
    }
  }
  return lanes[0];
}

template <typename scalar_t>
__device__ __forceinline__ Words narrow_lanes(const opmath_t<scalar_t> (&lanes)[kLanes<scalar_t>]) {
  Words vec;
  if constexpr (sizeof(scalar_t) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      vec.word[i] = narrow_pair(lanes[2 * i], lanes[2 * i + 1], scalar_t{});
    }
  } else if constexpr (sizeof(scalar_t) == 4) {
#pragma unroll
    for (int e = 0; e < 4; ++e) vec.word[e] = __builtin_bit_cast(unsigned, lanes[e]);
  } else {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      std::uint64_t bits = __builtin_bit_cast(std::uint64_t, lanes[e]);  // const, nvcc 13.0 fails on it: internal error
      vec.word[2 * e] = static_cast<unsigned>(bits);
      vec.word[2 * e + 1] = static_cast<unsigned>(bits >> 32);
    }
  }
  return vec;
}

// How a vector is moved: in one, by its four words, or by elements, of which the tile may have but some.
enum class Move { kVector, kWords, kElements };

// Where a vector lies, which of its lanes belong to the tile, [low, high), and where its byte of a mask lies.
template <typename scalar_t>
struct Segment {
  std::int64_t offset;  // in elements
  std::int64_t mask;
  int low;
  int high;

  __device__ __forceinline__ Move move() const {
    constexpr int kN = kLanes<scalar_t>;
    if (low != 0 || high != kN) return Move::kElements;
    const unsigned place = static_cast<unsigned>(offset) % kN;
    if (place == 0) return Move::kVector;
    return place * sizeof(scalar_t) % sizeof(unsigned) == 0 ? Move::kWords : Move::kElements;
  }

  __device__ __forceinline__ bool empty() const { return low >= high; }
  __device__ __forceinline__ const uint4* word(const void* data) const {
    return reinterpret_cast<const uint4*>(static_cast<const scalar_t*>(data) + offset);
  }
};

// The same where the plan promises that every vector is whole, and that 32 bits count them.
template <typename scalar_t>
struct WholeSegment {
  unsigned vector;
  unsigned mask;
  static constexpr int low = 0;
  static constexpr int high = kLanes<scalar_t>;
  static constexpr std::int64_t offset = 0;  // unused

  __device__ __forceinline__ static constexpr Move move() { return Move::kVector; }
  __device__ __forceinline__ static constexpr bool empty() { return false; }
  __device__ __forceinline__ const uint4* word(const void* data) const {
    return static_cast<const uint4*>(data) + vector;
  }
  // The same vector of the group's next tile.
  __device__ __forceinline__ WholeSegment of_next_tile(const LaunchPlan& plan) const {
    return {vector + static_cast<unsigned>(plan.next_tile), mask + static_cast<unsigned>(plan.next_mask)};
  }
};

// Lanes outside the segment are zero, and not read.
template <typename scalar_t, typename Where>
__device__ __forceinline__ uint4 load_lanes(const scalar_t* data, const Where& segment) {
  scalar_t lanes[kLanes<scalar_t>] = {};
#pragma unroll
  for (int e = 0; e < kLanes<scalar_t>; ++e) {
    if (e >= segment.low && e < segment.high) lanes[e] = data[segment.offset + e];
  }
  uint4 word;
  __builtin_memcpy(&word, lanes, kVectorBytes);
  return word;
}

__device__ __forceinline__ Words words_of(const uint4& vec) { return {vec.x, vec.y, vec.z, vec.w}; }

template <typename scalar_t, typename Where>
__device__ __forceinline__ Words load_vec(const void* data, const Where& segment) {
  const Move move = segment.move();
  if (move == Move::kVector) return words_of(__ldg(segment.word(data)));
  if (move == Move::kElements) return words_of(load_lanes(static_cast<const scalar_t*>(data), segment));
  Words vec;
#pragma unroll
  for (int i = 0; i < 4; ++i) vec.word[i] = __ldg(reinterpret_cast<const unsigned*>(segment.word(data)) + i);
  return vec;
}

// Stores to global memory, stated because the compiler cannot tell the address space of an opaque address.
__device__ __forceinline__ void store_word(uint4* to, const Words& vec) {
#if defined(__CUDACC__)
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(vec.word[0]), "r"(vec.word[1]),
               "r"(vec.word[2]), "r"(vec.word[3])
               : "memory");
#else
  *to = {vec.word[0], vec.word[1], vec.word[2], vec.word[3]};
#endif
}

// Lets L2 fetch what lies there, without waiting for it.
__device__ __forceinline__ void prefetch(const void* address) {
#if defined(__CUDACC__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
  asm volatile("" ::"r"(*static_cast<const char*>(address)));  // in emulation a read, whose address is checked
#endif
}

// `streams`: the results are too large for their next reader to find them in L2, and should not evict data that will be
// read again.
template <typename scalar_t, typename Where>
__device__ __forceinline__ void store_vec(void* data, const Where& segment, const Words& vec, bool streams) {
  const Move move = segment.move();
  if (move == Move::kVector) {
    auto* to = const_cast<uint4*>(segment.word(data));
    asm volatile("" : "+l"(to));  // otherwise each of the two branches would compute the address
    if (streams) {
      __stcs(to, uint4{vec.word[0], vec.word[1], vec.word[2], vec.word[3]});
    } else {
      store_word(to, vec);
    }
    return;
  }
  if (move == Move::kWords) {
    auto* to = const_cast<unsigned*>(reinterpret_cast<const unsigned*>(segment.word(data)));
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = vec.word[i];
    return;
  }
  scalar_t lanes[kLanes<scalar_t>];
  __builtin_memcpy(lanes, vec.word, kVectorBytes);
#pragma unroll
  for (int e = 0; e < kLanes<scalar_t>; ++e) {
    if (e >= segment.low && e < segment.high) static_cast<scalar_t*>(data)[segment.offset + e] = lanes[e];
  }
}

}  // namespace bnext::cuda
