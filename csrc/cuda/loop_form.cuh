// The forms of a loop over vectors, of which a call takes the fastest that it may.
//
//   kAny    serves every call.
//   kWhole  The plan promises that no vector is cut at a tile's ends.
//   kRelu   The same, and the call is of the commonest kind: nothing is asked at each vector about the activation and
//           optional tensors. Forward: ReLU. Backward: training with a residual, where a mask stands for the
//           pre-activation and both gradients are wanted.
#pragma once

#include <type_traits>

#include "staging.cuh"

namespace bnext::cuda {

enum class Loop { kAny, kWhole, kRelu };

// Whether the call is one for Loop::kRelu. A mask may be of ReLU6, which makes of its bits what ReLU makes of them.
template <typename Map>
__device__ __forceinline__ bool is_relu(const KernelArgs& args) {
  const Epilogue& epilogue = args.epilogue;
  if (!Map::kReadsGrad) return epilogue.activation.act == Act::kRelu;
  return epilogue.has_mask && epilogue.activation.act != Act::kLeakyRelu && epilogue.differentiates_statistics &&
         args.tensors.out[1] != nullptr;
}

// Calls f with the fastest form of a loop. kActivated: the activation matters to it. float64 goes without fast forms:
// it is rare, and the kernels take long to compile.
template <typename scalar_t, typename Map, bool kActivated, typename F>
__device__ __forceinline__ void in_form(const KernelArgs& args, F&& f) {
  if constexpr (sizeof(scalar_t) < sizeof(double)) {
    if constexpr (kActivated) {
      if (args.plan.whole && is_relu<Map>(args)) return f(std::integral_constant<Loop, Loop::kRelu>{});
    }
    if (args.plan.whole) return f(std::integral_constant<Loop, Loop::kWhole>{});
  }
  f(std::integral_constant<Loop, Loop::kAny>{});
}

// The call's epilogue, where the compiler knows what the form of the loop implies.
template <Loop kLoop, typename Map>
__device__ __forceinline__ Epilogue known_epilogue(const Epilogue& given) {
  Epilogue known = given;
  if (kLoop == Loop::kRelu) {
    known.activation.act = Act::kRelu;
    known.has_mask = Map::kReadsGrad;
    known.differentiates_statistics = Map::kReadsGrad;
    if (Map::kReadsGrad) known.has_residual = false;
  }
  return known;
}

// A functor, as far as the form of the loop says what it reads.
template <Loop kLoop, typename Map, typename Functor>
using Reads = std::conditional_t<kLoop == Loop::kRelu && Map::kReadsGrad, Masked<Functor>, Functor>;

}  // namespace bnext::cuda
