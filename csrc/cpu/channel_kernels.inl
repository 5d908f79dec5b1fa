// The per-channel mathematics for a register of channels at a time.

#include "block_io.inl"

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
    return dispatch(from.dtype, [&](auto tag) {
      return load_vector<double>(static_cast<const typename decltype(tag)::Type*>(from.data) + c, lanes);
    });
  }
  BNEXT_INLINE void store(const MutableChannelVector& to, std::int64_t c, const V& value) const {
    dispatch(to.dtype, [&](auto tag) {
      store_vector<double>(static_cast<typename decltype(tag)::Type*>(to.data) + c, value, lanes);
    });
  }
};

// Calls f(j, lanes) for each register of n channels: channels j, j + 1, ... are its lanes.
template <typename F>
BNEXT_INLINE void for_each_register(std::int64_t n, F&& f) {
  constexpr std::int64_t kN = kWidth<double>;
  std::int64_t j = 0;
  for (; j + kN <= n; j += kN) f(j, Whole{});
  if (j < n) f(j, Tail{static_cast<int>(n - j)});
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
void reduce_coefficients(const void* op_pointer, const Channels& of) {
  const Op& op = *static_cast<const Op*>(op_pointer);
  for_each_register(of.n, [&](std::int64_t j, auto lanes) {
    Vec<double> c[kMaxReduceCoefficients] = {};
    op.reduce_coefficients(of.c + j, c, ChannelLanes<decltype(lanes)>{lanes});
    store_coefficients(c, of, j, lanes, of.coefficient_count);
  });
}

template <typename Op>
bool find_needs_fp64(const void* op_pointer, const Channels& of, std::uint8_t* needs_fp64) {
  const Op& op = *static_cast<const Op*>(op_pointer);
  bool any = false;
  for_each_register(of.n, [&](std::int64_t j, auto lanes) {
    const auto accurate = op.accurate(load_sums(of, j, lanes));
    for (int l = 0; l < kWidth<double> && j + l < of.n; ++l) {
      needs_fp64[j + l] = accurate[l] == 0 ? 1 : 0;
      any |= accurate[l] == 0;
    }
  });
  return any;
}

template <typename Op>
double refined_shift(const void* op, const ChannelSums& sums) {
  return static_cast<const Op*>(op)->refined_shift(sums);
}

template <typename Op>
void finish_channels(const void* op_pointer, const Channels& of) {
  const Op& op = *static_cast<const Op*>(op_pointer);
  for_each_register(of.n, [&](std::int64_t j, auto lanes) {
    Vec<double> c[kMaxCoefficients] = {};
    op.finish(of.c + j, load_sums(of, j, lanes), of.stores, c, ChannelLanes<decltype(lanes)>{lanes});
    store_coefficients(c, of, j, lanes, of.coefficient_count);
  });
}

inline void narrow_coefficients(const double* wide, std::int64_t n, float* single, std::uint8_t* fits) {
  for_each_register(n, [&](std::int64_t j, auto lanes) {
    const Vec<double> v = load_vector<double>(wide + j, lanes);
    store_vector<double>(single + j, v, lanes);
    const auto fit = __builtin_convertvector(fits_float32(v), Vector<std::uint8_t, kWidth<double>>);
    if constexpr (std::is_same_v<decltype(lanes), Whole>) {
      store_raw(fits + j, load_raw<Vector<std::uint8_t, kWidth<double>>>(fits + j) & fit);
    } else {
      for (int l = 0; l < lanes.n; ++l) fits[j + l] &= fit[l];
    }
  });
}

template <typename Op>
constexpr ChannelKernels kChannelKernels = {&reduce_coefficients<Op>, &find_needs_fp64<Op>, &refined_shift<Op>,
                                            &finish_channels<Op>};
