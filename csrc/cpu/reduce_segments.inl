// Sums of blocks that belong to one channel each.

#include "block_io.inl"
#include "chains.inl"
#include "instantiate.inl"

// The lanes of a register as doubles, with the second half added to the first.
template <typename acc_t>
BNEXT_INLINE Vec<double> folded(Vec<acc_t> v) {
  if constexpr (sizeof(acc_t) == sizeof(double)) {
    return v;
  } else {
    Vector<acc_t, kWidth<double>> half[2];
    static_assert(sizeof half == sizeof v);
    __builtin_memcpy(half, &v, sizeof v);
    return to_double<kWidth<double>>(half[0]) + to_double<kWidth<double>>(half[1]);
  }
}

// The sum of all lanes in float64.
template <typename acc_t>
BNEXT_INLINE double total(const Vec<acc_t>& v) {
  return sum_of_lanes<kWidth<double>>(folded<acc_t>(v));
}
template <typename acc_t>
BNEXT_INLINE double total(const Vec<acc_t> (&v)[4]) {
  return sum_of_lanes<kWidth<double>>((folded<acc_t>(v[0]) + folded<acc_t>(v[1])) +
                                      (folded<acc_t>(v[2]) + folded<acc_t>(v[3])));
}
template <typename acc_t>
BNEXT_INLINE double total(const Vec<acc_t> (&v)[1]) {
  return total<acc_t>(v[0]);
}

// Adds the tail of a row.
template <typename acc_t, typename scalar_t, typename Op>
BNEXT_INLINE void add_tail(Vec<acc_t>& first, Vec<acc_t>& second, const Inputs<scalar_t, Op>& inputs,
                           const Vec<acc_t> (&c)[kMaxReduceCoefficients], const Flags& flags, std::int64_t i,
                           Tail tail) {
  Vec<acc_t> in[kMaxInputs];
  Vec<acc_t> a = {};
  Vec<acc_t> b = {};
  inputs.template load<acc_t>(in, flags, i, tail);
  inputs.template leave_out_padding<acc_t>(in, c, flags, i, tail);
  Op::template add<scalar_t>(a, b, in, c, flags.epilogue);
  first += keep<acc_t>(a, tail);
  second += keep<acc_t>(b, tail);
}

// The two sums of a channel, with kUnroll accumulators each, so that additions do not wait for one another.
template <typename acc_t, typename scalar_t, typename Op, Specialization kSpecialization, int kUnroll>
struct SegmentSums {
  static_assert(kUnroll == 4 || kUnroll == 1);
  static constexpr std::int64_t kN = kWidth<acc_t>;
  static constexpr std::int64_t kStep = kUnroll * kN;

  Vec<acc_t> first[kUnroll] = {};
  Vec<acc_t> second[kUnroll] = {};
  Vec<acc_t> first_outer[kUnroll] = {};
  Vec<acc_t> second_outer[kUnroll] = {};
  double first_total = 0.0;
  double second_total = 0.0;
  std::int64_t inner = 0;
  std::int64_t outer = 0;

  Vec<acc_t> c[kMaxReduceCoefficients] = {};
  const Flags given;

  BNEXT_INLINE SegmentSums(const ReduceArgs& args, std::int64_t channel) : given(flags_of<Op>(args)) {
    broadcast_coefficients<acc_t, Op>(c, args.coefficients, channel);
  }

  // A specialisation does not read `given`: flush_outer() gets the object's address, so no member stays a constant.
  BNEXT_INLINE Flags flags() const {
    if constexpr (kSpecialization == kAny) {
      return given;
    } else {
      return flags_of<Op>(kSpecialization);
    }
  }

  BNEXT_INLINE void add_vector(int u, const Inputs<scalar_t, Op>& inputs, std::int64_t i) {
    Vec<acc_t> in[kMaxInputs];
    inputs.template load<acc_t>(in, flags(), i, Whole{});
    inputs.template leave_out_padding<acc_t>(in, c, flags(), i, Whole{});
    Op::template add<scalar_t>(first[u], second[u], in, c, flags().epilogue);
  }

  // Which lane an element is added to makes no difference beyond the last bit of the sum.
  BNEXT_INLINE void add_two(int u, const Inputs<scalar_t, Op>& inputs, std::int64_t i) {
    if (flags().epilogue.has_mask || flags().has_padding) {
      add_vector(u, inputs, i);
      add_vector(u + 1, inputs, i + kN);
      return;
    }
    Vec<acc_t> in[2][kMaxInputs];
    inputs.template load_two<acc_t>(in, flags(), i);
    Op::template add<scalar_t>(first[u], second[u], in[0], c, flags().epilogue);
    Op::template add<scalar_t>(first[u + 1], second[u + 1], in[1], c, flags().epilogue);
  }

  // Adds elements [i, n), at most kInner * kStep of them.
  BNEXT_INLINE void add_run(const Inputs<scalar_t, Op>& inputs, std::int64_t i, std::int64_t n,
                            std::int64_t prefetch_distance) {
    inner += (n - i + kStep - 1) / kStep;
    if (prefetch_distance != 0) {
      for (std::int64_t j = i; j < n; j += kLineBytes / static_cast<std::int64_t>(sizeof(scalar_t))) {
        inputs.prefetch(flags(), j + prefetch_distance);
      }
    }
    if constexpr (kUnroll == 4) {
      for (; i + kStep <= n; i += kStep) {
#pragma GCC unroll 2
        for (int u = 0; u < kUnroll; u += 2) add_two(u, inputs, i + u * kN);
      }
      // The rest fills fewer than kUnroll registers; each is added to an accumulator of its own.
      if (i + kN <= n) add_vector(0, inputs, i), i += kN;
      if (i + kN <= n) add_vector(1, inputs, i), i += kN;
      if (i + kN <= n) add_vector(2, inputs, i), i += kN;
    } else {
      for (; i + kN <= n; i += kN) add_vector(0, inputs, i);
    }
    if (i < n) {
      const Tail tail{static_cast<int>(n - i)};
      add_tail<acc_t>(first[kUnroll - 1], second[kUnroll - 1], inputs, c, flags(), i, tail);
    }
    if (inner >= kInner) flush_inner();
  }

  BNEXT_INLINE void flush_inner() {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      first_outer[u] += first[u];
      second_outer[u] += second[u];
      first[u] = second[u] = Vec<acc_t>{};
    }
    inner = 0;
    if (++outer == kOuter) flush_outer();
  }

  // Not inlined: it would take registers from the loops.
  __attribute__((noinline)) void flush_outer() {
    first_total += total<acc_t>(first_outer);
    second_total += total<acc_t>(second_outer);
    for (int u = 0; u < kUnroll; ++u) first_outer[u] = second_outer[u] = Vec<acc_t>{};
    outer = 0;
  }

  // The sum of few elements is in the inner accumulators alone, and skips the outer ones.
  BNEXT_INLINE void flush() {
    if (outer == 0) {
      first_total += total<acc_t>(first);
      second_total += total<acc_t>(second);
    } else {
      flush_inner();
      if (outer != 0) flush_outer();
    }
  }
};

struct ReduceSegments {
  static constexpr std::int64_t kFewRegisters = 8;
  static_assert(kFewRegisters <= kInner);

  template <typename scalar_t, typename acc_t, typename Op, Specialization kSpecialization>
  static void run(const ReduceArgs& args) {
    const std::int64_t registers = args.block.rows * ((args.block.len + kWidth<acc_t> - 1) / kWidth<acc_t>);
    if (registers <= kFewRegisters) {
      const Flags flags = known_flags<Op, kSpecialization>(args);
      for (std::int64_t j = 0; j < args.channels; ++j) add_few<scalar_t, acc_t, Op>(args, flags, j);
    } else {
      for (std::int64_t j = 0; j < args.channels; ++j) add_channel<scalar_t, acc_t, Op, kSpecialization>(args, j);
    }
  }

  // For a channel of so few elements that the overhead of SegmentSums would exceed the additions.
  template <typename scalar_t, typename acc_t, typename Op>
  BNEXT_INLINE static void add_few(const ReduceArgs& args, const Flags& flags, std::int64_t j) {
    constexpr std::int64_t kN = kWidth<acc_t>;
    Vec<acc_t> c[kMaxReduceCoefficients] = {};
    broadcast_coefficients<acc_t, Op>(c, args.coefficients, j);
    Vec<acc_t> first = {};
    Vec<acc_t> second = {};
    for (std::int64_t r = 0; r < args.block.rows; ++r) {
      const Inputs<scalar_t, Op> inputs(args.block, flags, r, j * args.channel_stride, j * args.mask_channel_stride);
      Vec<acc_t> in[kMaxInputs];
      std::int64_t i = 0;
      for (; i + kN <= args.block.len; i += kN) {
        inputs.template load<acc_t>(in, flags, i, Whole{});
        inputs.template leave_out_padding<acc_t>(in, c, flags, i, Whole{});
        Op::template add<scalar_t>(first, second, in, c, flags.epilogue);
      }
      if (i < args.block.len) {
        const Tail tail{static_cast<int>(args.block.len - i)};
        add_tail<acc_t>(first, second, inputs, c, flags, i, tail);
      }
    }
    args.first[j] += total<acc_t>(first);
    args.second[j] += total<acc_t>(second);
  }

  template <typename scalar_t, typename acc_t, typename Op, Specialization kSpecialization>
  BNEXT_INLINE static void add_channel(const ReduceArgs& args, std::int64_t j) {
    using Sums = SegmentSums<acc_t, scalar_t, Op, kSpecialization, kIsOpmath<scalar_t, acc_t> ? 4 : 1>;
    constexpr std::int64_t kRun = kInner * Sums::kStep;
    const std::int64_t len = args.block.len;
    Sums sums(args, j);
    for (std::int64_t r = 0; r < args.block.rows; ++r) {
      const Inputs<scalar_t, Op> inputs(args.block, sums.flags(), r, j * args.channel_stride,
                                        j * args.mask_channel_stride);
      const std::int64_t prefetch_distance = r < args.prefetching_rows ? args.prefetch_distance : 0;
      for (std::int64_t i = 0; i < len; i += kRun) {
        sums.add_run(inputs, i, len - i < kRun ? len : i + kRun, prefetch_distance);
      }
    }
    sums.flush();
    args.first[j] += sums.first_total;
    args.second[j] += sums.second_total;
  }
};

void add_reduce_segments(KernelTable& table) { fill<ReduceSegments>(table.reduce_segments); }
