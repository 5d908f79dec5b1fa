// What the functors read of a vector, and the activation of its lanes: one branch on which it is for all of them, not
// one for each.
#pragma once

#include "vec.cuh"

namespace bnext::cuda {

// The vectors of each input at one place, as elementwise.h counts them, and that place's bits of a mask.
struct Item {
  Words vec[kMaxInputs];
  unsigned bits;
};

template <typename scalar_t>
using Lanes = opmath_t<scalar_t>[kLanes<scalar_t>];
template <typename scalar_t>
using Inputs = opmath_t<scalar_t>[kMaxInputs][kLanes<scalar_t>];

// All but the residual, which not every activated call looks at.
template <typename scalar_t, typename Functor>
__device__ __forceinline__ void widen_inputs(const Item& item, Inputs<scalar_t>& in) {
  if constexpr (Functor::kReadsInput) widen_lanes<scalar_t>(item.vec[0], in[0]);
  if constexpr (Functor::kReadsGrad) widen_lanes<scalar_t>(item.vec[1], in[1]);
}

// A mask's bits as what the functors take them for.
template <typename scalar_t>
__device__ __forceinline__ void widen_bits(unsigned bits, Lanes<scalar_t>& lanes) {
#pragma unroll
  for (int e = 0; e < kLanes<scalar_t>; ++e) lanes[e] = (bits >> e & 1u) != 0 ? 1 : 0;
}

// One lane of each input, in the type that it is computed with.
template <typename scalar_t, typename acc_t>
__device__ __forceinline__ void lane_of(const Inputs<scalar_t>& in, int e, acc_t (&lane)[kMaxInputs]) {
#pragma unroll
  for (int i = 0; i < kMaxInputs; ++i) lane[i] = static_cast<acc_t>(in[i][e]);
}

// The first lane of each input, as a double, straight from the words, which are then rotated by a lane: so a loop over
// the lanes need not be unrolled, and float64, which is rare, takes few registers and little code.
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

// The epilogue, whose activation the compiler knows.
template <Act kAct>
__device__ __forceinline__ Epilogue with_activation(std::integral_constant<Act, kAct>, Epilogue epilogue) {
  epilogue.activation.act = kAct;
  return epilogue;
}

// Calls f with the activation, as a constant. The commonest comes first.
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

// An activated functor's z of the lanes [first, end), where no mask stands for it.
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

// A bit for each lane, from the lowest on: whether it is above zero, or a NaN. Higher bits mean nothing.
template <typename acc_t, int kN>
__device__ __forceinline__ unsigned open_bits(const acc_t (&lanes)[kN]) {
  if constexpr (std::is_same_v<acc_t, double>) {
    unsigned open = 0;
#pragma unroll
    for (int e = 0; e < kN; ++e) open |= (lanes[e] <= 0 ? 0u : 1u) << e;
    return open;
  } else {
    // A float's bits are an integer above zero where the float is, and where it is a NaN. Saturated to two bits, from
    // -2 to 1, these integers alone are odd. An instruction packs two lanes: a quarter of what comparisons take.
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

// z = act(z); returns a mask's bits, of what a rectifier lets through.
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
    // Each branch tests the bits for itself, an instruction a lane. The compiler would take them apart before the
    // branch, and test the parts behind it.
    unsigned bits = item.bits;
    asm volatile("" : "+r"(bits));
    widen_bits<scalar_t>(bits, z);
    grad(act);
  };
  if (epilogue.has_mask) {
    if (epilogue.activation.act == Act::kLeakyRelu) {
      grad_of_bits(std::integral_constant<Act, Act::kLeakyRelu>{});
    } else {
      grad_of_bits(std::integral_constant<Act, Act::kRelu>{});  // which makes of bits what relu6 makes of them
    }
  } else {
    preactivation_lanes<scalar_t, Functor, kMax>(first, end, item, in, coefficients, epilogue, z);
    with_known(epilogue.activation.act, grad);
  }
  // Coefficients that wait in shared memory are read again after this, rather than held in registers.
  asm volatile("" ::: "memory");
}

}  // namespace bnext::cuda
