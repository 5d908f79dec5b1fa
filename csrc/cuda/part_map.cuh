// From each element to its results, by the coefficients of its part, in float64. Results at padding are zero.
#pragma once

#include "part_finish.cuh"

namespace bnext::cuda {

__device__ __forceinline__ void narrow(double value, double& to) { to = value; }
__device__ __forceinline__ void narrow(double value, float& to) { to = static_cast<float>(value); }
template <typename Half16>
__device__ __forceinline__ void narrow(double value, Half16& to) {
  to.bits = static_cast<std::uint16_t>(narrow_pair(static_cast<float>(value), 0.0f, Half16{}));
}

template <typename scalar_t>
__device__ __forceinline__ void store_result(void* to, std::int64_t offset, double value) {
  if (to != nullptr) narrow(value, static_cast<scalar_t*>(to)[offset]);
}

// Neighbouring threads hold the bits of a byte, which the first of them writes. All threads of a warp take part.
template <typename scalar_t>
__device__ __forceinline__ void store_mask(const PartArgs& args, const PartPlace& place, const PartElement& element,
                                           bool open) {
  const unsigned bits = __ballot_sync(0xffffffffu, open);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int shared = args.plan.mask_threads;
  if (lane % shared != 0 || !element.inside) return;
  args.tensors.new_mask[place.mask_byte<scalar_t>(element)] =
      static_cast<unsigned char>(bits >> lane & ((1u << shared) - 1u));
}

template <typename scalar_t, typename Map>
__global__ void __launch_bounds__(kPartThreads) part_map_kernel(const __grid_constant__ PartArgs args) {
  constexpr bool kForward = !Map::kReadsGrad;
  const Tensors& tensors = args.tensors;
  PartPlace place(args.plan);
  double c[kMaxCoefficients] = {};
  if (place.has_channel()) {
#pragma unroll
    for (int j = 0; j < Map::kCoefficients; ++j) c[j] = *part_coefficient(args, place.part(), j, place.channel());
  }
  for_each_element<scalar_t, Map>(args, place, [&](const PartElement& element, const double (&in)[kMaxInputs]) {
    Mapped<double> mapped = {};
    if (element.valid) mapped = Map::template apply<scalar_t>(in, c, args.epilogue);
    if (element.inside) {
      store_result<scalar_t>(tensors.out[0], element.offset, mapped.first);
      if constexpr (Map::kActivated && !kForward) store_result<scalar_t>(tensors.out[1], element.offset, mapped.second);
    }
    if constexpr (Map::kActivated && kForward) {
      // The bit is set for a NaN, too.
      if (tensors.new_mask != nullptr) store_mask<scalar_t>(args, place, element, !(mapped.second <= 0.0));
    }
  });
  // The kernels that read the old count, for the cumulative average, have ended.
  if (args.count_batches != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *args.count_batches += args.plan.parts;
}

}  // namespace bnext::cuda
