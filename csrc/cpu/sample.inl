// A channel's shift: the mean of a few rows, no finer than these are apart.

#include "block_io.inl"

template <typename acc_t, typename scalar_t, typename Lanes>
BNEXT_INLINE Vec<acc_t> sampled_shift(const scalar_t* x, const std::int64_t* offsets, int samples, Lanes lanes) {
  const acc_t half = static_cast<acc_t>(0.5);
  Vec<acc_t> level[kMaxSamples] = {};
  for (int i = 0; i < samples; ++i) level[i] = load_vector<acc_t>(x + offsets[i], lanes);
  for (int n = samples; n > 1; n /= 2) {
    for (int i = 0; i < n / 2; ++i) level[i] = average(level[2 * i], level[2 * i + 1], half);
  }
  Vec<acc_t> distance = {};
  for (int i = 0; i < samples; ++i) {
    const Vec<acc_t> off = load_vector<acc_t>(x + offsets[i], lanes) - level[0];
    distance = farthest(distance, off);
  }
  return shift_of_samples(level[0], distance);
}

template <typename scalar_t, typename acc_t>
void sample(const SampleArgs& args) {
  constexpr std::int64_t kN = kWidth<acc_t>;
  const auto* x = static_cast<const scalar_t*>(args.in);
  std::int64_t j = 0;
  for (; j + kN <= args.len; j += kN) {
    const auto shift = sampled_shift<acc_t>(x + j, args.offsets, args.samples, Whole{});
    for (int l = 0; l < kN; ++l) args.shift[j + l] = static_cast<double>(shift[l]);
  }
  if (j < args.len) {
    const Tail tail{static_cast<int>(args.len - j)};
    const auto shift = sampled_shift<acc_t>(x + j, args.offsets, args.samples, tail);
    for (int l = 0; l < tail.n; ++l) args.shift[j + l] = static_cast<double>(shift[l]);
  }
}
