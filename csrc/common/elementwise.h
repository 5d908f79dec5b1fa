// What batch norm does to an element, as functors that the traversals are instantiated with.
//
// A reduce functor adds an element's two terms to a channel's two sums. A map functor turns an element into its
// output with the channel's coefficients. V is a scalar or a SIMD vector; in[0] is the input x, in[1] the incoming
// gradient dy, each read only by the functors that say so. Elements are shifted by a value near the channel's mean
// before anything else, because that subtraction is exact or nearly so, while the sums of what is left are free of
// cancellation.
#pragma once

#include "inline.h"

namespace bnext {

// sum of (x - shift), sum of (x - shift)^2
struct MomentSums {
  static constexpr bool kReadsInput = true;
  static constexpr bool kReadsGrad = false;
  template <typename V>
  BNEXT_INLINE static void add(V& first, V& second, const V (&in)[2], const V& shift) {
    const V centred = in[0] - shift;
    first += centred;
    second += centred * centred;
  }
};

// sum of dy, sum of dy*(x - shift)
struct GradSums {
  static constexpr bool kReadsInput = true;
  static constexpr bool kReadsGrad = true;
  template <typename V>
  BNEXT_INLINE static void add(V& first, V& second, const V (&in)[2], const V& shift) {
    first += in[1];
    second += in[1] * (in[0] - shift);
  }
};

// sum of dy alone, where nobody asks for more and x may be gone
struct BiasGradSum {
  static constexpr bool kReadsInput = false;
  static constexpr bool kReadsGrad = true;
  template <typename V>
  BNEXT_INLINE static void add(V& first, V&, const V (&in)[2], const V&) {
    first += in[1];
  }
};

// nothing, where a map needs no sums
struct NoSums {
  static constexpr bool kReadsInput = false;
  static constexpr bool kReadsGrad = false;
  template <typename V>
  BNEXT_INLINE static void add(V&, V&, const V (&)[2], const V&) {}
};

constexpr int kMaxCoefficients = 4;

// y = (x - c0)*c1 + c2
struct Normalize {
  static constexpr bool kReadsInput = true;
  static constexpr bool kReadsGrad = false;
  static constexpr int kCoefficients = 3;
  template <typename V>
  BNEXT_INLINE static V apply(const V (&in)[2], const V (&c)[kMaxCoefficients]) {
    return (in[0] - c[0]) * c[1] + c[2];
  }
};

// dx = dy*c1 + ((x - c0)*c2 + c3), training
struct GradInput {
  static constexpr bool kReadsInput = true;
  static constexpr bool kReadsGrad = true;
  static constexpr int kCoefficients = 4;
  template <typename V>
  BNEXT_INLINE static V apply(const V (&in)[2], const V (&c)[kMaxCoefficients]) {
    return in[1] * c[1] + ((in[0] - c[0]) * c[2] + c[3]);
  }
};

// dx = dy*c0, evaluation: the statistics do not depend on x, and x is not read
struct ScaleGrad {
  static constexpr bool kReadsInput = false;
  static constexpr bool kReadsGrad = true;
  static constexpr int kCoefficients = 1;
  template <typename V>
  BNEXT_INLINE static V apply(const V (&in)[2], const V (&c)[kMaxCoefficients]) {
    return in[1] * c[0];
  }
};

}  // namespace bnext
