// What batch norm does to an element, as functors that the traversals are instantiated with.
//
// A reduce functor adds an element's two terms to a channel's two sums. A map functor turns an element into its
// results. Both get the channel's coefficients c. T is the type of the tensors' elements; V, what they are computed
// with, a scalar or a SIMD vector; in[] is
//   in[0]  the input x
//   in[1]  the incoming gradient dy
//   in[2]  the residual; or, where a mask stands for the pre-activation, its bit: 1 where the rectifier is open, else 0
// each read only by the functors that say so, and by an activated one only if the call has it. Elements are shifted by
// a value near the channel's mean before anything else, because that subtraction is exact or nearly so, while the sums
// of what is left are free of cancellation.
#pragma once

#include "activation.h"
#include "half.h"
#include "inline.h"

namespace bnext {

constexpr int kMaxInputs = 3;
constexpr int kMaxReduceCoefficients = 4;
constexpr int kMaxCoefficients = 5;

// The type that elements of type T are computed in, unless float32 proves too narrow.
template <typename T>
using opmath_t = std::conditional_t<sizeof(T) == sizeof(double), double, float>;

template <typename T>
constexpr Digits kDigits = Digits::kFloat32;
template <>
constexpr Digits kDigits<Half> = Digits::kFloat16;
template <>
constexpr Digits kDigits<BFloat16> = Digits::kBFloat16;

// What follows the normalisation: act(batch_norm(x) + residual). Functors without an activation ignore it.
struct Epilogue {
  Activation activation;
  bool has_residual = false;
  bool has_mask = false;                   // to be read, in backward
  bool differentiates_statistics = false;  // in backward: training

  // Activations are evaluated in opmath_t also where float32 is too narrow for the coefficients and V is of doubles:
  // the pre-activation has the magnitude of normalised values, which float32 can represent.
  template <typename T, typename V>
  BNEXT_INLINE V activate(const V& z) const {
    if constexpr (std::is_same_v<opmath_t<T>, scalar_of<V>>) {
      return bnext::activate<kDigits<T>>(activation, z);
    } else {
      return lane_by_lane(z, [this](auto lane) {
        return static_cast<scalar_of<V>>(bnext::activate<kDigits<T>>(activation, static_cast<opmath_t<T>>(lane)));
      });
    }
  }

  // act'(z)*dy
  template <typename T, typename V>
  BNEXT_INLINE V grad(const V& z, const V& dy) const {
    if constexpr (std::is_same_v<opmath_t<T>, scalar_of<V>>) {
      return activation_grad<kDigits<T>>(activation, z, dy);
    } else {
      const V derivative = lane_by_lane(z, [this](auto lane) {
        constexpr opmath_t<T> kOne = 1;
        return static_cast<scalar_of<V>>(activation_grad<kDigits<T>>(activation, static_cast<opmath_t<T>>(lane), kOne));
      });
      // Where the derivative is 0 an infinite dy gives 0, not a NaN.
      return derivative == static_cast<scalar_of<V>>(0) ? V{} : dy * derivative;
    }
  }
};

// sum of (x - c0), sum of (x - c0)^2
struct MomentSums {
  static constexpr bool kReadsInput = true;
  static constexpr bool kReadsGrad = false;
  static constexpr bool kActivated = false;
  static constexpr int kCoefficients = 1;
  template <typename T, typename V>
  BNEXT_INLINE static void add(V& first, V& second, const V (&in)[kMaxInputs], const V (&c)[kMaxReduceCoefficients],
                               const Epilogue&) {
    const V centred = in[0] - c[0];
    first += centred;
    second += centred * centred;
  }
};

// sum of dy, sum of dy*(x - c0)
struct GradSums {
  static constexpr bool kReadsInput = true;
  static constexpr bool kReadsGrad = true;
  static constexpr bool kActivated = false;
  static constexpr int kCoefficients = 1;
  template <typename T, typename V>
  BNEXT_INLINE static void add(V& first, V& second, const V (&in)[kMaxInputs], const V (&c)[kMaxReduceCoefficients],
                               const Epilogue&) {
    first += in[1];
    second += in[1] * (in[0] - c[0]);
  }
};

// sum of dy alone: grad_bias, for which x is not read
struct BiasGradSum {
  static constexpr bool kReadsInput = false;
  static constexpr bool kReadsGrad = true;
  static constexpr bool kActivated = false;
  static constexpr int kCoefficients = 0;
  template <typename T, typename V>
  BNEXT_INLINE static void add(V& first, V&, const V (&in)[kMaxInputs], const V (&)[kMaxReduceCoefficients],
                               const Epilogue&) {
    first += in[1];
  }
};

// nothing, where a map needs no sums
struct NoSums {
  static constexpr bool kReadsInput = false;
  static constexpr bool kReadsGrad = false;
  static constexpr bool kActivated = false;
  static constexpr int kCoefficients = 0;
  template <typename T, typename V>
  BNEXT_INLINE static void add(V&, V&, const V (&)[kMaxInputs], const V (&)[kMaxReduceCoefficients], const Epilogue&) {}
};

// A map's results: `first` is the output or grad_input. An activated map has a `second`: in forward a number that is
// above zero, or a NaN, where the mask's bit is to be 1; grad_residual in backward.
template <typename V>
struct Mapped {
  V first;
  V second;
};

// y = (x - c0)*c1 + c2
struct Normalize {
  static constexpr bool kReadsInput = true;
  static constexpr bool kReadsGrad = false;
  static constexpr bool kActivated = false;
  static constexpr int kCoefficients = 3;
  template <typename T, typename V>
  BNEXT_INLINE static Mapped<V> apply(const V (&in)[kMaxInputs], const V (&c)[kMaxCoefficients], const Epilogue&) {
    return {(in[0] - c[0]) * c[1] + c[2], V{}};
  }
};

// dx = dy*c1 + ((x - c0)*c2 + c3), training
struct GradInput {
  static constexpr bool kReadsInput = true;
  static constexpr bool kReadsGrad = true;
  static constexpr bool kActivated = false;
  static constexpr int kCoefficients = 4;
  template <typename T, typename V>
  BNEXT_INLINE static Mapped<V> apply(const V (&in)[kMaxInputs], const V (&c)[kMaxCoefficients], const Epilogue&) {
    return {in[1] * c[1] + ((in[0] - c[0]) * c[2] + c[3]), V{}};
  }
};

// dx = dy*c0, evaluation: the statistics do not depend on x, and x is not read
struct ScaleGrad {
  static constexpr bool kReadsInput = false;
  static constexpr bool kReadsGrad = true;
  static constexpr bool kActivated = false;
  static constexpr int kCoefficients = 1;
  template <typename T, typename V>
  BNEXT_INLINE static Mapped<V> apply(const V (&in)[kMaxInputs], const V (&c)[kMaxCoefficients], const Epilogue&) {
    return {in[1] * c[0], V{}};
  }
};

// The same functors with an activation, and perhaps a residual. In backward dz = dy*act'(z) takes the place of dy; the
// pre-activation z is recomputed, or a mask says where the rectifier is open. Each functor comes in steps (z, then
// act(z) or dz, then the rest), so that a traversal can switch over the activations once for several elements.

// z = (x - shift)*scale + offset + residual: in forward and in backward the same operations, hence the same bits.
template <typename V>
BNEXT_INLINE V preactivation(const V (&in)[kMaxInputs], const V& shift, const V& scale, const V& offset,
                             const Epilogue& epilogue) {
  if (epilogue.has_mask) return in[2];
  const V normalized = (in[0] - shift) * scale + offset;
  return epilogue.has_residual ? normalized + in[2] : normalized;
}

// sum of dz, sum of dz*(x - c0); the pre-activation's shift is c3
struct ActivatedGradSums {
  static constexpr bool kReadsInput = true;
  static constexpr bool kReadsGrad = true;
  static constexpr bool kActivated = true;
  static constexpr int kCoefficients = 4;
  template <typename V>
  BNEXT_INLINE static V z(const V (&in)[kMaxInputs], const V (&c)[kMaxReduceCoefficients], const Epilogue& epilogue) {
    return preactivation(in, c[3], c[1], c[2], epilogue);
  }
  template <typename V>
  BNEXT_INLINE static void add_given(const V& dz, V& first, V& second, const V (&in)[kMaxInputs],
                                     const V (&c)[kMaxReduceCoefficients]) {
    first += dz;
    second += dz * (in[0] - c[0]);
  }
  template <typename T, typename V>
  BNEXT_INLINE static void add(V& first, V& second, const V (&in)[kMaxInputs], const V (&c)[kMaxReduceCoefficients],
                               const Epilogue& epilogue) {
    add_given(epilogue.grad<T>(z(in, c, epilogue), in[1]), first, second, in, c);
  }
};

// y = act((x - c0)*c1 + c2 + residual)
struct ActivatedNormalize {
  static constexpr bool kReadsInput = true;
  static constexpr bool kReadsGrad = false;
  static constexpr bool kActivated = true;
  static constexpr int kCoefficients = 3;
  template <typename V>
  BNEXT_INLINE static V z(const V (&in)[kMaxInputs], const V (&c)[kMaxCoefficients], const Epilogue& epilogue) {
    return preactivation(in, c[0], c[1], c[2], epilogue);
  }
  template <typename T, typename V>
  BNEXT_INLINE static Mapped<V> apply(const V (&in)[kMaxInputs], const V (&c)[kMaxCoefficients],
                                      const Epilogue& epilogue) {
    const V before = z(in, c, epilogue);
    return {epilogue.activate<T>(before), opening(epilogue.activation, before)};
  }
};

// dx = dz*c1 + ((x - c0)*c2 + c3) in training, dz*c1 in evaluation; the offset is c4
struct ActivatedGrad {
  static constexpr bool kReadsInput = true;
  static constexpr bool kReadsGrad = true;
  static constexpr bool kActivated = true;
  static constexpr int kCoefficients = 5;
  template <typename V>
  BNEXT_INLINE static V z(const V (&in)[kMaxInputs], const V (&c)[kMaxCoefficients], const Epilogue& epilogue) {
    return preactivation(in, c[0], c[1], c[4], epilogue);
  }
  template <typename V>
  BNEXT_INLINE static V grad_input(const V& dz, const V (&in)[kMaxInputs], const V (&c)[kMaxCoefficients],
                                   const Epilogue& epilogue) {
    // Adding -0 changes nothing, not even a zero's sign.
    const V by_statistics = epilogue.differentiates_statistics ? (in[0] - c[0]) * c[2] + c[3] : -V{};
    return dz * c[1] + by_statistics;
  }
  template <typename T, typename V>
  BNEXT_INLINE static Mapped<V> apply(const V (&in)[kMaxInputs], const V (&c)[kMaxCoefficients],
                                      const Epilogue& epilogue) {
    const V dz = epilogue.grad<T>(z(in, c, epilogue), in[1]);
    return {grad_input(dz, in, c, epilogue), dz};
  }
};

}  // namespace bnext
