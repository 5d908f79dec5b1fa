// A first idea of a channel's mean, to shift its values by: the average of a few of them.
#pragma once

#include <cstdint>

#include "inline.h"
#include "statistics.h"

namespace bnext {

constexpr int kMaxSamples = 16;

// Positions spread over all of the channel's count = N*HW values, so that a first image unlike the rest does not
// mislead. The stagger keeps them off any one pixel. `samples` is a power of two.
struct SamplePositions {
  std::int64_t at[kMaxSamples];
  int samples;
  explicit SamplePositions(std::int64_t count) : samples(1) {
    while (samples < kMaxSamples && samples * 2 <= count) samples *= 2;
    const std::int64_t step = count / samples;
    for (int i = 0; i < samples; ++i) at[i] = i * step + (i * std::int64_t{7919}) % step;
  }
};

// The samples are averaged in pairs, and the averages again: equal values are not rounded. Each is halved before it is
// added, for the sum of two huge values would overflow.
template <typename V, typename acc_t>
BNEXT_INLINE V average(const V& a, const V& b, acc_t half) {
  return a * half + b * half;
}

// The distance of a sample that is `off` the mean, or of the farthest before it.
template <typename V>
BNEXT_INLINE V farthest(const V& distance, const V& off) {
  const V size = off < static_cast<scalar_of<V>>(0) ? -off : off;
  return size > distance ? size : distance;
}

// The mean of the samples, the farthest of which is `distance` from it, as a shift (coarse_shift). An infinite sample
// shifts nothing: minus itself it is no number, and the mean is to be infinite.
template <typename V>
BNEXT_INLINE V shift_of_samples(const V& mean, const V& distance) {
  const V size = distance * static_cast<scalar_of<V>>(4);
  const V shift = coarse_shift<V>(mean, size, mean + size);
  return is_finite(shift) ? shift : V{};
}

}  // namespace bnext
