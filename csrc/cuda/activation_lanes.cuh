// What the functors read of a vector, and the activation of its lanes. A vector branches on the activation once, not
// once for each lane.
#pragma once

#include "vec.cuh"

namespace bnext::cuda {

// One vector of each input, in the order of in[] (elementwise.h), and the mask's bits for its lanes.
struct Item {
  Words vec[kMaxInputs];
  unsigned bits;
};

template <typename scalar_t>
using Lanes = opmath_t<scalar_t>[kLanes<scalar_t>];
template <typename scalar_t>
using Inputs = opmath_t<scalar_t>[kMaxInputs][kLanes<scalar_t>];

// Widens every input but the residual, which not every activated call reads.
template <typename scalar_t, typename Functor>
__device__ __forceinline__ void widen_inputs(const Item& item, Inputs<scalar_t>& in) {
  if constexpr (Functor::kReadsInput) widen_lanes<scalar_t>(item.vec[0], in[0]);
  if constexpr (Functor::kReadsGrad) widen_lanes<scalar_t>(item.vec[1], in[1]);
}

// A mask's bits as the 0 or 1 that the functors read in place of the pre-activation.
template <typename scalar_t>
__device__ __forceinline__ void widen_bits(unsigned bits, Lanes<scalar_t>& lanes) {
#pragma unroll
  for (int e = 0; e < kLanes<scalar_t>; ++e) lanes[e] = (bits >> e & 1u) != 0 ? 1 : 0;
}

// One lane of each input, in the compute type.
template <typename scalar_t, typename acc_t>
__device__ __forceinline__ void lane_of(const Inputs<scalar_t>& in, int e, acc_t (&lane)[kMaxInputs]) {
#pragma unroll
  for (int i = 0; i < kMaxInputs; ++i) lane[i] = static_cast<acc_t>(in[i][e]);
}

// Takes the first lane of each input as a double, and rotates the words by one lane, so that a loop over the lanes need
// not be unrolled: the float64 path is rare, and should take few registers and little code.
template <typename scalar_t, typename Functor>
__device__ __forceinline__ void take_wide_lane(Item& item, const Epilogue& epilogue, double (&lane)[kMaxInputs]) {
  if constexpr (Functor::kReadsInput) lane[0] = take_lane<scalar_t>(item.vec[0]);
  if constexpr (Functor::kReadsGrad) lane[1] = take_lane<scalar_t>(item.vec[1]);
  if constexpr (Functor::kActivated) {
    const double residual = take_lane<scalar_t>(item.vec[2]);
    lane[2] = epilogue.has_mask ? static_cast<double>(item.bits & 1u) : residual;
    item.bits >>= 1;
  }
}

// The epilogue with its activation as a compile-time constant.
template <Act kAct>
__device__ __forceinline__ Epilogue with_activation(std::integral_constant<Act, kAct>, Epilogue epilogue) {
  epilogue.activation.act = kAct;
  return epilogue;
}

// Calls f with the activation as a compile-time constant. ReLU, the most common one, is tested first.
template <typename F>
__device__ __forceinline__ void with_known(Act act, F&& f) {
  if (act == Act::kRelu) return f(std::integral_constant<Act, Act::kRelu>{});
  switch (act) {
    case Act::kRelu6: return f(std::integral_constant<Act, Act::kRelu6>{});
    case Act::kLeakyRelu: return f(std::integral_constant<Act, Act::kLeakyRelu>{});
    case Act::kSilu: return f(std::integral_constant<Act, Act::kSilu>{});
    case Act::kGelu: return f(std::integral_constant<Act, Act::kGelu>{});
    case Act::kHardswish: return f(std::integral_constant<Act, Act::kHardswish>{});
    case Act::kMish: return f(std::integral_constant<Act, Act::kMish>{});
    case Act::kElu: return f(std::integral_constant<Act, Act::kElu>{});
    case Act::kRelu:
    case Act::kIdentity: break;
  }
  f(std::integral_constant<Act, Act::kIdentity>{});
}

// The pre-activation z of the lanes [first, end), for an activated functor in a call where no mask stands for it.
template <typename scalar_t, typename Functor, int kMax, typename Coefficients>
__device__ __forceinline__ void preactivation_lanes(int first, int end, const Item& item, Inputs<scalar_t>& in,
                                                    const Coefficients& coefficients, Epilogue epilogue,
                                                    Lanes<scalar_t>& z) {
  opmath_t<scalar_t> c[kLanes<scalar_t>][kMax] = {};
  widen_lanes<scalar_t>(item.vec[2], in[2]);
  coefficients.get(first, end, c);
  epilogue.has_mask = false;
#pragma unroll
  for (int e = first; e < end; ++e) {
    opmath_t<scalar_t> lane[kMaxInputs];
    lane_of<scalar_t>(in, e, lane);
    z[e] = Functor::z(lane, c[e], epilogue);
  }
}

// Bit e says whether lane e is above zero or a NaN. Bits beyond the last lane's are unspecified.
template <typename acc_t, int kN>
__device__ __forceinline__ unsigned open_bits(const acc_t (&lanes)[kN]) {
  if constexpr (std::is_same_v<acc_t, double>) {
    unsigned open = 0;
#pragma unroll
    for (int e = 0; e < kN; ++e) open |= (lanes[e] <= 0 ? 0u : 1u) << e;
    return open;
  } else {
    // The bits of a float, read as an integer, are above zero where the float is, or is a NaN. Saturated to two bits,
    // [-2, 1], only integers above zero are odd. One instruction packs two lanes: a quarter of what comparisons take.
    unsigned packed[2] = {};  // of the even lanes, and of the odd ones
#pragma unroll
    for (int e = kN - 4; e >= 0; e -= 4) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        packed[i] = saturate_pair(unsigned_nan_bits(lanes[e + i + 2]), unsigned_nan_bits(lanes[e + i]), packed[i]);
      }
    }
    return (packed[0] & 0x55u) | (packed[1] << 1 & ~0x55u);
  }
}

// z = act(z). Returns a mask's bits, which are set for the lanes that a rectifier lets through.
template <typename scalar_t>
__device__ __forceinline__ unsigned activate_lanes(const Epilogue& epilogue, Lanes<scalar_t>& z) {
  unsigned open = 0;
  with_known(epilogue.activation.act, [&](auto act) {
    const Epilogue known = with_activation(act, epilogue);
    if (known.activation.rectifies()) {
      Lanes<scalar_t> opened;
#pragma unroll
      for (int e = 0; e < kLanes<scalar_t>; ++e) opened[e] = opening(known.activation, z[e]);
      open = open_bits(opened);
    }
#pragma unroll
    for (int e = 0; e < kLanes<scalar_t>; ++e) z[e] = known.activate<scalar_t>(z[e]);
  });
  return open;
}

// A backward functor's dz = dy*act'(z), of the lanes [first, end).
template <typename scalar_t, typename Functor, int kMax, typename Coefficients>
__device__ __forceinline__ void dz_lanes(int first, int end, const Item& item, Inputs<scalar_t>& in,
                                         const Coefficients& coefficients, const Epilogue& epilogue,
                                         Lanes<scalar_t>& dz) {
  Lanes<scalar_t> z;
  const auto grad = [&](auto act) {
    const Epilogue known = with_activation(act, epilogue);
#pragma unroll
    for (int e = first; e < end; ++e) dz[e] = known.grad<scalar_t>(z[e], in[1][e]);
  };
  const auto grad_of_bits = [&](auto act) {
    // The asm statement makes each branch test the bits by itself, with one instruction a lane. Otherwise the compiler
    // extracts the bits before the branch, and tests them behind it.
    unsigned bits = item.bits;
    asm volatile("" : "+r"(bits));
    widen_bits<scalar_t>(bits, z);
    grad(act);
  };
  if (epilogue.has_mask) {
    if (epilogue.activation.act == Act::kLeakyRelu) {
      grad_of_bits(std::integral_constant<Act, Act::kLeakyRelu>{});
    } else {
      grad_of_bits(std::integral_constant<Act, Act::kRelu>{});  // ReLU6 has the same gradient, given bits
    }
  } else {
    preactivation_lanes<scalar_t, Functor, kMax>(first, end, item, in, coefficients, epilogue, z);
    with_known(epilogue.activation.act, grad);
  }
  // After this the compiler reads coefficients from shared memory again, rather than hold them in registers.
  asm volatile("" ::: "memory");
}

}  // namespace bnext::cuda
