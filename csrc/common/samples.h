// A first idea of a channel's mean, to shift its values by: the average of a few of them.
#pragma once

#include <cstdint>

#include "inline.h"

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

}  // namespace bnext
