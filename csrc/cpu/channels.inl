// The per-channel mathematics for a register of channels at a time.

#include "rows.inl"

// Channels c, c + 1, ... as the lanes of a register (an Access of common/channel_ops.h).
template <typename Lanes>
struct ChannelLanes {
  using V = Vec<double>;
  Lanes lanes;

  BNEXT_INLINE V load(const double* from, std::int64_t c) const { return load_vector<double>(from + c, lanes); }
  BNEXT_INLINE void store(double* to, std::int64_t c, const V& value) const {
    store_vector<double>(to + c, value, lanes);
  }

  BNEXT_INLINE V load(const ChannelVector& from, std::int64_t c) const {
    switch (from.dtype) {
      case DType::kFloat32: return load_vector<double>(static_cast<const float*>(from.data) + c, lanes);
      case DType::kFloat64: return load_vector<double>(static_cast<const double*>(from.data) + c, lanes);
      case DType::kFloat16: return load_vector<double>(static_cast<const Half*>(from.data) + c, lanes);
      case DType::kBFloat16: return load_vector<double>(static_cast<const BFloat16*>(from.data) + c, lanes);
    }
    __builtin_unreachable();
  }
  BNEXT_INLINE void store(const MutableChannelVector& to, std::int64_t c, const V& value) const {
    switch (to.dtype) {
      case DType::kFloat32: return store_vector<double>(static_cast<float*>(to.data) + c, value, lanes);
      case DType::kFloat64: return store_vector<double>(static_cast<double*>(to.data) + c, value, lanes);
      case DType::kFloat16: return store_vector<double>(static_cast<Half*>(to.data) + c, value, lanes);
      case DType::kBFloat16: return store_vector<double>(static_cast<BFloat16*>(to.data) + c, value, lanes);
    }
    __builtin_unreachable();
  }
};

// Calls f(j, lanes) for channels j, j + 1, ... of n.
template <typename F>
BNEXT_INLINE void for_each_register(std::int64_t n, F&& f) {
  constexpr std::int64_t kN = kWidth<double>;
  std::int64_t j = 0;
  for (; j + kN <= n; j += kN) f(j, Whole{});
  if (j < n) f(j, Part{static_cast<int>(n - j)});
}

template <typename Lanes>
BNEXT_INLINE SumsOf<Vec<double>> load_sums(const Channels& of, std::int64_t j, Lanes lanes) {
  return {load_vector<double>(of.shift + j, lanes), load_vector<double>(of.first + j, lanes),
          load_vector<double>(of.second + j, lanes)};
}

template <int kMax, typename Lanes>
BNEXT_INLINE void store_coefficients(const Vec<double> (&c)[kMax], const Channels& of, std::int64_t j, Lanes lanes,
                                     int count) {
  for (int k = 0; k < kMax; ++k) {
    if (k < count) store_vector<double>(of.coefficients + k * of.stride + j, c[k], lanes);
  }
}

template <typename Op>
void reduce_coefficients(const Op& op, const Channels& of) {
  for_each_register(of.n, [&](std::int64_t j, auto lanes) {
    Vec<double> c[kMaxReduceCoefficients] = {};
    op.reduce_coefficients(of.c + j, c, ChannelLanes<decltype(lanes)>{lanes});
    store_coefficients(c, of, j, lanes, of.coefficient_count);
  });
}

template <typename Op>
bool find_doubtful(const Op& op, const Channels& of, std::uint8_t* doubtful) {
  bool any = false;
  for_each_register(of.n, [&](std::int64_t j, auto lanes) {
    const auto accurate = op.accurate(load_sums(of, j, lanes));
    for (int l = 0; l < kWidth<double> && j + l < of.n; ++l) {
      doubtful[j + l] = accurate[l] == 0 ? 1 : 0;
      any |= accurate[l] == 0;
    }
  });
  return any;
}

template <typename Op>
void finish_channels(const Op& op, const Channels& of) {
  for_each_register(of.n, [&](std::int64_t j, auto lanes) {
    Vec<double> c[kMaxCoefficients] = {};
    op.finish(of.c + j, load_sums(of, j, lanes), /*stores=*/true, c, ChannelLanes<decltype(lanes)>{lanes});
    store_coefficients(c, of, j, lanes, of.coefficient_count);
  });
}

inline void narrow_coefficients(const double* wide, std::int64_t n, float* single, std::uint8_t* fits) {
  for_each_register(n, [&](std::int64_t j, auto lanes) {
    const Vec<double> v = load_vector<double>(wide + j, lanes);
    store_vector<double>(single + j, v, lanes);
    const auto fit = fits_float32(v);
    for (int l = 0; l < kWidth<double> && j + l < n; ++l) fits[j + l] &= fit[l] == 0 ? 0 : 1;
  });
}

template <typename Op>
constexpr ChannelLeaves<Op> kChannelLeaves = {&reduce_coefficients<Op>, &find_doubtful<Op>, &finish_channels<Op>};
