// Maps a block in which each row belongs to one channel.

#include "block_io.inl"
#include "instantiate.inl"

template <typename scalar_t, typename acc_t, typename Op, bool kUnrolled>
struct RowMap {
  static constexpr std::int64_t kN = kWidth<acc_t>;
  // Rows of fewer lines are stored through the caches: their first and last lines are incomplete.
  static constexpr std::int64_t kMinNonTemporal = 10 * kLineElements<scalar_t>;

  const MapArgs& args;
  const Flags& flags;
  OpenLine<scalar_t>& open;  // a reference: as a member it would keep the coefficients out of registers
  const bool dense;          // the next row begins where this one ends
  const bool non_temporal;
  Vec<acc_t> c[kMaxCoefficients] = {};

  BNEXT_INLINE RowMap(const MapArgs& args, const Flags& flags, OpenLine<scalar_t>& open)
      : args(args),
        flags(flags),
        open(open),
        dense(args.block.len == args.block.stride),
        non_temporal(kIsOpmath<scalar_t, acc_t> && args.non_temporal && args.block.len >= kMinNonTemporal &&
                     Outputs<scalar_t, Op>(args, flags, 0).can_store_non_temporal(flags, args.block.stride)) {}

  template <typename Lanes>
  BNEXT_INLINE Mapped<Vec<acc_t>> mapped(const Inputs<scalar_t, Op>& inputs, std::int64_t i, Lanes lanes) const {
    Vec<acc_t> in[kMaxInputs];
    inputs.template load<acc_t>(in, flags, i, lanes);
    return inputs.template without_padding<acc_t>(Op::template apply<scalar_t>(in, c, flags.epilogue), flags, i, lanes);
  }

  // Maps whole lines' worth of elements from i on, and returns the first element that is left.
  template <bool kNonTemporal>
  BNEXT_INLINE std::int64_t map_lines(const Inputs<scalar_t, Op>& inputs, const Outputs<scalar_t, Op>& outputs,
                                      std::int64_t i) const {
    constexpr std::int64_t kLine = kLineVectors<acc_t, scalar_t> * kN;
    if constexpr (kUnrolled) {
#pragma GCC unroll 4
      for (; i + kLine <= args.block.len; i += kLine) map_line<kNonTemporal>(inputs, outputs, i);
    } else {
      for (; i + kLine <= args.block.len; i += kLine) map_line<kNonTemporal>(inputs, outputs, i);
    }
    return i;
  }

  template <bool kNonTemporal>
  BNEXT_INLINE void map_line(const Inputs<scalar_t, Op>& inputs, const Outputs<scalar_t, Op>& outputs,
                             std::int64_t i) const {
    constexpr int kVectors = kLineVectors<acc_t, scalar_t>;
    Mapped<Vec<acc_t>> line[kVectors];
    if (args.prefetch_distance != 0) inputs.prefetch(flags, i + args.prefetch_distance);
    if (!kNonTemporal && args.write_prefetch != 0) outputs.write_prefetch(flags, i + args.write_prefetch);
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) line[u] = mapped(inputs, i + u * kN, Whole{});
    outputs.template store_line_of<acc_t, kNonTemporal>(line, flags, i);
  }

  // Maps elements [i, n), less than a line's worth.
  BNEXT_INLINE void map_tail(const Inputs<scalar_t, Op>& inputs, const Outputs<scalar_t, Op>& outputs, std::int64_t i,
                             std::int64_t n) const {
    if (args.write_prefetch != 0) outputs.write_prefetch(flags, i + args.write_prefetch);
    if constexpr (kLineVectors<acc_t, scalar_t> > 1) {
      for (; i + kN <= n; i += kN) outputs.template store<acc_t>(mapped(inputs, i, Whole{}), flags, i, Whole{});
    }
    if (i < n) {
      const Tail tail{static_cast<int>(n - i)};
      outputs.template store<acc_t>(mapped(inputs, i, tail), flags, i, tail);
    }
  }

  BNEXT_INLINE void run(std::int64_t r) {
    const std::int64_t len = args.block.len;
    if (r == 0 || args.coefficient_step != 0) {
      broadcast_coefficients<acc_t, Op>(c, args.coefficients, r * args.coefficient_step);
    }
    const Inputs<scalar_t, Op> inputs(args.block, flags, r);
    Outputs<scalar_t, Op> outputs(args, flags, r);
    std::int64_t i = 0;
    if constexpr (kIsOpmath<scalar_t, acc_t>) {
      if (non_temporal) {
        i = outputs.before_lines(flags);
        const bool is_open = open.filled != 0;
        map_tail(inputs, is_open ? outputs.into(open, flags, 0) : outputs, 0, i);
        if (is_open) outputs.close(open, flags, i);
        i = map_lines<true>(inputs, outputs, i);
        if (dense && r + 1 < args.block.rows) {
          outputs = outputs.into(open, flags, i);
          open.filled = len - i;
        }
      }
    }
    if (!non_temporal) i = map_lines<false>(inputs, outputs, 0);
    map_tail(inputs, outputs, i, len);
  }
};

struct MapSegments {
  template <typename scalar_t, typename acc_t, typename Op, Specialization kSpecialization>
  static void run(const MapArgs& call) {
    const MapArgs args = call;  // a local copy, which no store to an output can alias
    const Flags flags = known_flags<Op, kSpecialization>(args);
    OpenLine<scalar_t> open;
    RowMap<scalar_t, acc_t, Op, kCommon<scalar_t, acc_t, Op, kSpecialization>> map(args, flags, open);
    for (std::int64_t r = 0; r < args.block.rows; ++r) map.run(r);
    if (map.non_temporal) non_temporal_fence();
  }
};

void add_map_segments(KernelTable& table) { fill<MapSegments>(table.map_segments); }
