// From a vector to its results, once the coefficients are known.
#pragma once

#include <type_traits>

#include "activation_lanes.cuh"
#include "coefficients.cuh"

namespace bnext::cuda {

// Where float32 is too narrow, coefficients stay in shared memory: as doubles they would need too many registers.
template <typename scalar_t, typename Map, Tile kTile, typename acc_t>
using MapCoefficients =
    LaneCoefficients<scalar_t, acc_t, kTile,
                     !kIsOpmath<scalar_t, acc_t> && kKeep<scalar_t, acc_t, Map, kTile> == Keep::kRegisters
                         ? Keep::kChannels
                         : kKeep<scalar_t, acc_t, Map, kTile>,
                     Map::kCoefficients>;

// Only an activated map has more than `first`: in backward `second` is grad_residual; in forward `open` holds a mask's
// bits, which are set for the lanes that a rectifier lets through.
template <typename scalar_t>
struct Results {
  Lanes<scalar_t> first;
  Lanes<scalar_t> second;
  unsigned open;
};

template <typename scalar_t, typename Map, typename Coefficients>
__device__ __forceinline__ void map_plain(const Item& item, const Epilogue& epilogue, const Coefficients& coefficients,
                                          Results<scalar_t>& results) {
  using Acc = opmath_t<scalar_t>;
  constexpr int kN = kLanes<scalar_t>;
  Inputs<scalar_t> in = {};
  Acc c[kN][kMaxCoefficients] = {};
  widen_inputs<scalar_t, Map>(item, in);
  coefficients.get(0, kN, c);
#pragma unroll
  for (int e = 0; e < kN; ++e) {
    Acc lane[kMaxInputs];
    lane_of<scalar_t>(in, e, lane);
    results.first[e] = Map::template apply<scalar_t>(lane, c[e], epilogue).first;
  }
}

template <typename scalar_t, typename Map, typename Coefficients>
__device__ __forceinline__ void map_activated(const Item& item, const Epilogue& epilogue,
                                              const Coefficients& coefficients, Results<scalar_t>& results) {
  Inputs<scalar_t> in = {};
  widen_inputs<scalar_t, Map>(item, in);
  preactivation_lanes<scalar_t, Map, kMaxCoefficients>(0, kLanes<scalar_t>, item, in, coefficients, epilogue,
                                                       results.first);
  results.open = activate_lanes<scalar_t>(epilogue, results.first);
}

template <typename scalar_t, typename Map, Tile kTile, typename Coefficients>
__device__ __forceinline__ void map_activated_grad(const Item& item, const Epilogue& epilogue,
                                                   const Coefficients& coefficients, Results<scalar_t>& results) {
  using Acc = opmath_t<scalar_t>;
  constexpr int kN = kLanes<scalar_t>;
  constexpr int kAtOnce = kLanesAtOnce<scalar_t, kTile>;
  Inputs<scalar_t> in = {};
  Acc c[kN][kMaxCoefficients] = {};
  widen_inputs<scalar_t, Map>(item, in);
#pragma unroll
  for (int begin = 0; begin < kN; begin += kAtOnce) {
    const int end = begin + kAtOnce;
    dz_lanes<scalar_t, Map, kMaxCoefficients>(begin, end, item, in, coefficients, epilogue, results.second);
    coefficients.get(begin, end, c);
    const auto grad_input = [&](auto differentiates) {
      Epilogue known = epilogue;
      known.differentiates_statistics = differentiates.value;
#pragma unroll
      for (int e = begin; e < end; ++e) {
        Acc lane[kMaxInputs];
        lane_of<scalar_t>(in, e, lane);
        results.first[e] = Map::grad_input(results.second[e], lane, c[e], known);
      }
    };
    if (epilogue.differentiates_statistics) {
      grad_input(std::true_type{});
    } else {
      grad_input(std::false_type{});
    }
  }
}

// The value becomes the last lane; the others move down by one.
template <typename scalar_t>
__device__ __forceinline__ void append_lane(Lanes<scalar_t>& lanes, double value) {
#pragma unroll
  for (int e = 1; e < kLanes<scalar_t>; ++e) lanes[e - 1] = lanes[e];
  lanes[kLanes<scalar_t> - 1] = static_cast<opmath_t<scalar_t>>(value);
}

// The map in float64, where float32 is too narrow: 16-bit results are rounded twice. It takes a lane at a time, in a
// loop that is not unrolled, because code that rarely runs should not take long to compile.
template <typename scalar_t, typename Map, typename Coefficients>
__device__ __forceinline__ void map_wide(Item item, const Epilogue& epilogue, const Coefficients& coefficients,
                                         Results<scalar_t>& results) {
#pragma unroll 1
  for (int e = 0; e < kLanes<scalar_t>; ++e) {
    double lane[kMaxInputs] = {};
    double c[kMaxCoefficients] = {};
    take_wide_lane<scalar_t, Map>(item, epilogue, lane);
    coefficients.get_one(e, c);
    const Mapped<double> mapped = Map::template apply<scalar_t>(lane, c, epilogue);
    append_lane<scalar_t>(results.first, mapped.first);
    append_lane<scalar_t>(results.second, mapped.second);
    results.open |= (mapped.second <= 0 ? 0u : 1u) << e;
  }
}

template <typename scalar_t, typename Map, Tile kTile, typename Coefficients>
__device__ __forceinline__ Results<scalar_t> map_vector(const Item& item, const Epilogue& epilogue,
                                                        const Coefficients& coefficients) {
  using Opmath = MapCoefficients<scalar_t, Map, kTile, opmath_t<scalar_t>>;
  Results<scalar_t> results = {};
  if constexpr (!std::is_same_v<Coefficients, Opmath>) {
    map_wide<scalar_t, Map>(item, epilogue, coefficients, results);
  } else if constexpr (!Map::kActivated) {
    map_plain<scalar_t, Map>(item, epilogue, coefficients, results);
  } else if constexpr (Map::kReadsGrad) {
    map_activated_grad<scalar_t, Map, kTile>(item, epilogue, coefficients, results);
  } else {
    map_activated<scalar_t, Map>(item, epilogue, coefficients, results);
  }
  return results;
}

}  // namespace bnext::cuda
