// The channels' shifts: the mean of a few samples of each, without bits finer than an ulp of their spread.

#include "block_io.inl"

// One value of each channel, one channel a lane.
template <typename acc_t, typename scalar_t>
BNEXT_INLINE Vec<acc_t> load_channels(const scalar_t* x, std::int64_t stride, Whole) {
  if (stride == 1) return load_vector<acc_t>(x);
  scalar_t packed[kWidth<acc_t>];
  for (int l = 0; l < kWidth<acc_t>; ++l) packed[l] = x[l * stride];
  return load_vector<acc_t>(packed);
}
template <typename acc_t, typename scalar_t>
BNEXT_INLINE Vec<acc_t> load_channels(const scalar_t* x, std::int64_t stride, Tail tail) {
  scalar_t packed[kWidth<acc_t>] = {};
  for (int l = 0; l < tail.n; ++l) packed[l] = x[l * stride];
  return load_vector<acc_t>(packed);
}

template <int kSamples, typename acc_t, typename scalar_t, typename Lanes>
BNEXT_INLINE Vec<acc_t> sampled_shift(const scalar_t* x, const SampleArgs& args, Lanes lanes) {
  const acc_t half = static_cast<acc_t>(0.5);
  Vec<acc_t> sample[kSamples];
  Vec<acc_t> level[kSamples];
#pragma GCC unroll 16
  for (int i = 0; i < kSamples; ++i) {
    level[i] = sample[i] = load_channels<acc_t>(x + args.offsets[i], args.stride, lanes);
  }
#pragma GCC unroll 16
  for (int n = kSamples; n > 1; n /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) level[i] = average(level[2 * i], level[2 * i + 1], half);
  }
  Vec<acc_t> distance = {};
#pragma GCC unroll 16
  for (int i = 0; i < kSamples; ++i) distance = farthest(distance, Vec<acc_t>(sample[i] - level[0]));
  return shift_of_samples(level[0], distance);
}

template <int kSamples, typename scalar_t, typename acc_t>
void sample_so_many(const SampleArgs& args) {
  constexpr std::int64_t kN = kWidth<acc_t>;
  const auto* x = static_cast<const scalar_t*>(args.in);
  std::int64_t j = 0;
  for (; j + kN <= args.len; j += kN) {
    const auto shift = sampled_shift<kSamples, acc_t>(x + j * args.stride, args, Whole{});
    store_raw(args.shift + j, __builtin_convertvector(shift, Vector<double, kWidth<acc_t>>));
  }
  if (j < args.len) {
    const Tail tail{static_cast<int>(args.len - j)};
    const auto shift = sampled_shift<kSamples, acc_t>(x + j * args.stride, args, tail);
    for (int l = 0; l < tail.n; ++l) args.shift[j + l] = static_cast<double>(shift[l]);
  }
}

// The number of samples is a compile-time constant, so that the samples stay in registers.
template <typename scalar_t, typename acc_t>
void sample(const SampleArgs& args) {
  switch (args.samples) {
    case 1: return sample_so_many<1, scalar_t, acc_t>(args);
    case 2: return sample_so_many<2, scalar_t, acc_t>(args);
    case 4: return sample_so_many<4, scalar_t, acc_t>(args);
    case 8: return sample_so_many<8, scalar_t, acc_t>(args);
    default: static_assert(kMaxSamples == 16); return sample_so_many<16, scalar_t, acc_t>(args);
  }
}
