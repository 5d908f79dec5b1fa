// The forms of a loop over vectors. A call takes the fastest form that serves it.
//
//   kAny    serves every call.
//   kWhole  The plan promises that no vector is cut at a tile's ends.
//   kRelu   The same, and the call is of the most common kind: no vector branches on the activation or, in backward,
//           on optional tensors. Forward: ReLU. Backward: training with a residual, where a mask stands for the
//           pre-activation and both gradients are wanted.
#pragma once

#include <type_traits>

#include "staging.cuh"

namespace bnext::cuda {

enum class Loop { kAny, kWhole, kRelu };

// Whether Loop::kRelu serves the call. The mask may be ReLU6's: given its bits, ReLU6 has the gradient of ReLU.
template <typename Map>
__device__ __forceinline__ bool is_relu(const KernelArgs& args) {
  const Epilogue& epilogue = args.epilogue;
  if (!Map::kReadsGrad) return epilogue.activation.act == Act::kRelu;
  return epilogue.has_mask && epilogue.activation.act != Act::kLeakyRelu && epilogue.differentiates_statistics &&
         args.tensors.out[1] != nullptr;
}

// Calls f with the fastest form of a loop that serves the call. kActivated: whether the loop depends on the activation.
// float64 has no fast forms: it is rare, and the kernels take long to compile.
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

// The call's epilogue, with compile-time constants for what the form of the loop implies.
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

// The functor; as Masked, where the form of the loop implies what it reads.
template <Loop kLoop, typename Map, typename Functor>
using Reads = std::conditional_t<kLoop == Loop::kRelu && Map::kReadsGrad, Masked<Functor>, Functor>;

}  // namespace bnext::cuda
