// A first estimate of a channel's mean, to shift its values by: the average of a few of them.
#pragma once

#include <cstdint>

#include "inline.h"
#include "statistics.h"

namespace bnext {

constexpr int kMaxSamples = 16;

// Positions spread over all of the channel's count = N*HW values, so that an unusual first image does not mislead. The
// stagger keeps them from falling on the same pixel of each image. `samples` is a power of two.
struct SamplePositions {
  std::int64_t at[kMaxSamples];
  int samples;
  explicit SamplePositions(std::int64_t count) : samples(1) {
    while (samples < kMaxSamples && samples * 2 <= count) samples *= 2;
    const std::int64_t step = count / samples;
    for (int i = 0; i < samples; ++i) at[i] = i * step + (i * std::int64_t{7919}) % step;
  }
};

// The samples are averaged in pairs, and the averages again, so that equal values are not rounded. Each value is halved
// before it is added, for the sum of two huge values would overflow.
template <typename V, typename acc_t>
BNEXT_INLINE V average(const V& a, const V& b, acc_t half) {
  return a * half + b * half;
}

// The distance of the farthest sample from the mean: of one that is `off` the mean, or of those before (`distance`).
template <typename V>
BNEXT_INLINE V farthest(const V& distance, const V& off) {
  const V size = off < static_cast<scalar_of<V>>(0) ? -off : off;
  return size > distance ? size : distance;
}

// The mean of the samples, the farthest of which is `distance` from it, as a shift (coarse_shift). With an infinite
// sample the shift is 0: an infinity minus itself is NaN, and the channel's mean is to be infinite.
template <typename V>
BNEXT_INLINE V shift_of_samples(const V& mean, const V& distance) {
  const V size = distance * static_cast<scalar_of<V>>(4);
  const V shift = coarse_shift<V>(mean, size, mean + size);
  return is_finite(shift) ? shift : V{};
}

}  // namespace bnext
