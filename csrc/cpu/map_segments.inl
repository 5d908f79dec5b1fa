// Maps of a block whose rows belong to one channel each.

#include "rows.inl"
#include "table.inl"

template <typename scalar_t, typename acc_t, typename Op, bool kUnrolled>
struct RowMap {
  static constexpr std::int64_t kN = kWidth<acc_t>;
  // Rows that are not much longer than the lines which their ends are of are not streamed.
  static constexpr std::int64_t kMinStreamed = 10 * kLineElements<scalar_t>;

  const MapArgs& args;
  const Setup& setup;
  OpenLine<scalar_t>& open;  // not a part, or the coefficients would not stay in registers
  const bool dense;          // the next row begins where this one ends
  const bool streams;
  Vec<acc_t> c[kMaxCoefficients] = {};

  BNEXT_INLINE RowMap(const MapArgs& args, const Setup& setup, OpenLine<scalar_t>& open)
      : args(args),
        setup(setup),
        open(open),
        dense(args.block.len == args.block.stride),
        streams(kNaturally<scalar_t, acc_t> && args.streams && args.block.len >= kMinStreamed &&
                Outputs<scalar_t, Op>(args, setup, 0).can_stream(setup, args.block.stride)) {}

  template <typename Lanes>
  BNEXT_INLINE Mapped<Vec<acc_t>> mapped(const Inputs<scalar_t, Op>& inputs, std::int64_t i, Lanes lanes) const {
    Vec<acc_t> in[kMaxInputs];
    inputs.template load<acc_t>(in, setup, i, lanes);
    return Op::template apply<scalar_t>(in, c, setup.epilogue);
  }

  // Whole lines from element i on; what is left begins at what is returned.
  template <bool kStream>
  BNEXT_INLINE std::int64_t map_lines(const Inputs<scalar_t, Op>& inputs, const Outputs<scalar_t, Op>& outputs,
                                      std::int64_t i) const {
    constexpr std::int64_t kLine = kLineVectors<acc_t, scalar_t> * kN;
    if constexpr (kUnrolled) {
#pragma GCC unroll 4
      for (; i + kLine <= args.block.len; i += kLine) map_line<kStream>(inputs, outputs, i);
    } else {
      for (; i + kLine <= args.block.len; i += kLine) map_line<kStream>(inputs, outputs, i);
    }
    return i;
  }

  template <bool kStream>
  BNEXT_INLINE void map_line(const Inputs<scalar_t, Op>& inputs, const Outputs<scalar_t, Op>& outputs,
                             std::int64_t i) const {
    constexpr int kVectors = kLineVectors<acc_t, scalar_t>;
    Mapped<Vec<acc_t>> line[kVectors];
    if (args.ahead != 0) inputs.prefetch(setup, i + args.ahead);
    if (!kStream && args.reserve != 0) outputs.reserve(setup, i + args.reserve);
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) line[u] = mapped(inputs, i + u * kN, Whole{});
    outputs.template store_line_of<acc_t, kStream>(line, setup, i);
  }

  // Elements [i, n), less than a line.
  BNEXT_INLINE void map_rest(const Inputs<scalar_t, Op>& inputs, const Outputs<scalar_t, Op>& outputs, std::int64_t i,
                             std::int64_t n) const {
    if (args.reserve != 0) outputs.reserve(setup, i + args.reserve);
    if constexpr (kLineVectors<acc_t, scalar_t> > 1) {
      for (; i + kN <= n; i += kN) outputs.template store<acc_t>(mapped(inputs, i, Whole{}), setup, i, Whole{});
    }
    if (i < n) {
      const Part part{static_cast<int>(n - i)};
      outputs.template store<acc_t>(mapped(inputs, i, part), setup, i, part);
    }
  }

  BNEXT_INLINE void run(std::int64_t r) {
    const std::int64_t len = args.block.len;
    if (r == 0 || args.coefficient_step != 0) {
      broadcast_coefficients<acc_t, Op>(c, args.coefficients, r * args.coefficient_step);
    }
    const Inputs<scalar_t, Op> inputs(args.block, setup, r);
    Outputs<scalar_t, Op> outputs(args, setup, r);
    std::int64_t i = 0;
    if constexpr (kNaturally<scalar_t, acc_t>) {
      if (streams) {
        i = outputs.before_lines(setup);
        const bool is_open = open.filled != 0;
        map_rest(inputs, is_open ? outputs.into(open, setup, 0) : outputs, 0, i);
        if (is_open) outputs.close(open, setup, i);
        i = map_lines<true>(inputs, outputs, i);
        if (dense && r + 1 < args.block.rows) {
          outputs = outputs.into(open, setup, i);
          open.filled = len - i;
        }
      }
    }
    if (!streams) i = map_lines<false>(inputs, outputs, 0);
    map_rest(inputs, outputs, i, len);
  }
};

struct MapSegments {
  template <typename scalar_t, typename acc_t, typename Op, Form kForm>
  static void run(const MapArgs& call) {
    const MapArgs args = call;  // a copy that no store to an output can be taken to change
    const Setup setup = known_setup<Op, kForm>(args);
    OpenLine<scalar_t> open;
    RowMap<scalar_t, acc_t, Op, kCommon<scalar_t, acc_t, Op, kForm>> map(args, setup, open);
    for (std::int64_t r = 0; r < args.block.rows; ++r) map.run(r);
    if (map.streams) finish_streams();
  }
};

void add_map_segments(LeafTable& table) { fill<MapSegments>(table.map_segments); }
