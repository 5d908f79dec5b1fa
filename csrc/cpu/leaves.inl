// The leaves themselves. Each isa_*.cpp includes this file once, inside its own namespace and under its target
// pragma; nothing of the standard library is instantiated here, so that no function compiled for a newer
// processor can be merged with a copy that an older one calls.

#include "rows.inl"

// Sums have three levels, so that no chain of float32 additions is long: a lane takes kInner of them and is then
// added to an outer lane, which takes kOuter of those and is then added to a double. Equal values round the same way
// at every step, so the error of a single chain of 128 would reach 128 * 2^-25; here it is (16 + 8) * 2^-25.
constexpr std::int64_t kInner = 16;
constexpr std::int64_t kOuter = 8;

// The coefficients of the lanes from element j on; of all alike, where they belong to one channel.
template <typename acc_t, typename Op, int kMax, typename Lanes>
BNEXT_INLINE void load_coefficients(Vec<acc_t> (&c)[kMax], const void* const (&from)[kMax], std::int64_t j,
                                    Lanes lanes) {
  for (int k = 0; k < Op::kCoefficients; ++k) c[k] = load_vector<acc_t>(static_cast<const acc_t*>(from[k]) + j, lanes);
}
template <typename acc_t, typename Op, int kMax>
BNEXT_INLINE void broadcast_coefficients(Vec<acc_t> (&c)[kMax], const void* const (&from)[kMax], std::int64_t j) {
  for (int k = 0; k < Op::kCoefficients; ++k) c[k] = broadcast(static_cast<const acc_t*>(from[k])[j]);
}

// What is worth unrolling: the way that nearly all data takes. The rest is a good part of the code, and compiles in a
// fraction of the time without. Not where it would change a sum's order: a gradient's bits must not depend on which
// others are asked for, and so on the form.
template <typename scalar_t, typename acc_t, typename Op, Form kForm>
constexpr bool kCommon = kNaturally<scalar_t, acc_t> && (!Op::kActivated || kForm != kAny);

// The two sums of a channel: kUnroll registers each, so that additions do not wait for one another.
template <typename acc_t, typename scalar_t, typename Op, int kUnroll>
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
  const Setup setup;
  const std::int64_t ahead;

  BNEXT_INLINE SegmentSums(const ReduceArgs& args, const Setup& setup) : setup(setup), ahead(args.ahead) {
    broadcast_coefficients<acc_t, Op>(c, args.coefficients, 0);
  }

  BNEXT_INLINE void add_vector(int u, const Inputs<scalar_t, Op>& inputs, std::int64_t i) {
    Vec<acc_t> in[kMaxInputs];
    inputs.template load<acc_t>(in, setup, i, Whole{});
    Op::template add<scalar_t>(first[u], second[u], in, c, setup.epilogue);
  }

  // What is added to which lane makes no difference, but to the last bit.
  BNEXT_INLINE void add_two(int u, const Inputs<scalar_t, Op>& inputs, std::int64_t i) {
    if (setup.epilogue.has_mask) {
      add_vector(u, inputs, i);
      add_vector(u + 1, inputs, i + kN);
      return;
    }
    Vec<acc_t> in[2][kMaxInputs];
    inputs.template load_two<acc_t>(in, setup, i);
    Op::template add<scalar_t>(first[u], second[u], in[0], c, setup.epilogue);
    Op::template add<scalar_t>(first[u + 1], second[u + 1], in[1], c, setup.epilogue);
  }

  BNEXT_INLINE void add_part(int u, const Inputs<scalar_t, Op>& inputs, std::int64_t i, Part part) {
    Vec<acc_t> in[kMaxInputs];
    Vec<acc_t> a = {};
    Vec<acc_t> b = {};
    inputs.template load<acc_t>(in, setup, i, part);
    Op::template add<scalar_t>(a, b, in, c, setup.epilogue);
    first[u] += keep<acc_t>(a, part);
    second[u] += keep<acc_t>(b, part);
  }

  // Elements [i, n), at most kInner * kStep of them.
  BNEXT_INLINE void add_run(const Inputs<scalar_t, Op>& inputs, std::int64_t i, std::int64_t n) {
    inner += (n - i) / kStep + 1;
    if (ahead != 0) {
      for (std::int64_t j = i; j < n; j += kLineBytes / static_cast<std::int64_t>(sizeof(scalar_t))) {
        inputs.prefetch(setup, j + ahead);
      }
    }
    if constexpr (kUnroll == 4) {
      for (; i + kStep <= n; i += kStep) {
#pragma GCC unroll 2
        for (int u = 0; u < kUnroll; u += 2) add_two(u, inputs, i + u * kN);
      }
      // What is left fills fewer than kUnroll registers; each goes to a register of its own.
      if (i + kN <= n) add_vector(0, inputs, i), i += kN;
      if (i + kN <= n) add_vector(1, inputs, i), i += kN;
      if (i + kN <= n) add_vector(2, inputs, i), i += kN;
    } else {
      for (; i + kN <= n; i += kN) add_vector(0, inputs, i);
    }
    if (i < n) add_part(kUnroll - 1, inputs, i, Part{static_cast<int>(n - i)});
    if (inner >= kInner) settle();
  }

  BNEXT_INLINE void settle() {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      first_outer[u] += first[u];
      second_outer[u] += second[u];
      first[u] = second[u] = Vec<acc_t>{};
    }
    inner = 0;
    if (++outer == kOuter) flush();
  }

  // Kept out of the loops: it would take their registers.
  __attribute__((noinline)) void flush() {
    for (int u = 0; u < kUnroll; ++u) {
      for (int l = 0; l < kN; ++l) {
        first_total += static_cast<double>(first_outer[u][l]);
        second_total += static_cast<double>(second_outer[u][l]);
      }
      first_outer[u] = second_outer[u] = Vec<acc_t>{};
    }
    outer = 0;
  }
};

struct ReduceSegments {
  template <typename scalar_t, typename acc_t, typename Op, Form kForm>
  static void run(const ReduceArgs& args) {
    using Sums = SegmentSums<acc_t, scalar_t, Op, kNaturally<scalar_t, acc_t> ? 4 : 1>;
    constexpr std::int64_t kRun = kInner * Sums::kStep;
    const std::int64_t len = args.block.len;
    Sums sums(args, known_setup<Op, kForm>(args));
    for (std::int64_t r = 0; r < args.block.rows; ++r) {
      const Inputs<scalar_t, Op> inputs(args.block, sums.setup, r);
      for (std::int64_t i = 0; i < len; i += kRun) sums.add_run(inputs, i, len - i < kRun ? len : i + kRun);
    }
    sums.settle();
    sums.flush();
    *args.first += sums.first_total;
    *args.second += sums.second_total;
  }
};

// Rows of one channel each.
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

// Columns are reduced in slabs whose sums stay in the first-level cache; inside a slab a tile of a few rows at a
// time, whose sums are made in registers and then added to the slab's.
constexpr std::int64_t kSlabColumns = 1024;
static_assert(kMaxTileRows == kInner);

struct ReduceColumns {
  // Adds rows [t0, t1) of kUnroll registers of columns, from column j of the block on, to the slab's sums.
  template <typename scalar_t, typename acc_t, typename Op, int kUnroll, typename Lanes>
  BNEXT_INLINE static void add(const ReduceArgs& args, const Setup& setup, std::int64_t t0, std::int64_t t1,
                               std::int64_t j, acc_t* first, acc_t* second, Lanes lanes) {
    constexpr std::int64_t kN = kWidth<acc_t>;
    constexpr int kLine = kLineVectors<acc_t, scalar_t>;
    Vec<acc_t> a[kUnroll] = {};
    Vec<acc_t> b[kUnroll] = {};
    Vec<acc_t> k[kUnroll][kMaxReduceCoefficients] = {};
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) load_coefficients<acc_t, Op>(k[u], args.coefficients, j + u * kN, lanes);
    if (args.ahead != 0) {
      for (std::int64_t r = t0; r < t1; ++r) {
        const Inputs<scalar_t, Op> inputs(args.block, setup, r);
        for (int u = 0; u < kUnroll; u += kLine) inputs.prefetch(setup, j + u * kN + args.ahead);
      }
    }
    for (std::int64_t r = t0; r < t1; ++r) {
      const Inputs<scalar_t, Op> inputs(args.block, setup, r);
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        Vec<acc_t> in[kMaxInputs];
        inputs.template load<acc_t>(in, setup, j + u * kN, lanes);
        Op::template add<scalar_t>(a[u], b[u], in, k[u], setup.epilogue);
      }
    }
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      store_raw(first + u * kN, load_raw<Vec<acc_t>>(first + u * kN) + a[u]);
      store_raw(second + u * kN, load_raw<Vec<acc_t>>(second + u * kN) + b[u]);
    }
  }

  template <typename scalar_t, typename acc_t, typename Op, Form kForm>
  static void run(const ReduceArgs& call) {
    constexpr std::int64_t kN = kWidth<acc_t>;
    constexpr int kUnroll = kCommon<scalar_t, acc_t, Op, kForm> ? 4 : 1;
    const ReduceArgs args = call;  // a copy that no store to a sum can be taken to change
    const Setup setup = known_setup<Op, kForm>(args);
    alignas(64) acc_t first[kSlabColumns];
    alignas(64) acc_t second[kSlabColumns];
    for (std::int64_t c0 = 0; c0 < args.block.len; c0 += kSlabColumns) {
      const std::int64_t columns = args.block.len - c0 < kSlabColumns ? args.block.len - c0 : kSlabColumns;
      const std::int64_t tile_rows = args.tile_rows;
      const std::int64_t flush_rows = tile_rows * (kInner + kOuter - tile_rows);
      for (std::int64_t r0 = 0; r0 < args.block.rows; r0 += flush_rows) {
        const std::int64_t r1 = args.block.rows - r0 < flush_rows ? args.block.rows : r0 + flush_rows;
        // To the end of the last register: lanes beyond the columns are added to as well, and not read.
        for (std::int64_t c = 0; c < (columns + kN - 1) / kN * kN; ++c) first[c] = second[c] = 0;
        for (std::int64_t t0 = r0; t0 < r1; t0 += tile_rows) {
          const std::int64_t t1 = r1 - t0 < tile_rows ? r1 : t0 + tile_rows;
          std::int64_t c = 0;
          if constexpr (kUnroll > 1) {
            for (; c + kUnroll * kN <= columns; c += kUnroll * kN) {
              add<scalar_t, acc_t, Op, kUnroll>(args, setup, t0, t1, c0 + c, first + c, second + c, Whole{});
            }
          }
          for (; c + kN <= columns; c += kN) {
            add<scalar_t, acc_t, Op, 1>(args, setup, t0, t1, c0 + c, first + c, second + c, Whole{});
          }
          if (c < columns) {
            const Part part{static_cast<int>(columns - c)};
            add<scalar_t, acc_t, Op, 1>(args, setup, t0, t1, c0 + c, first + c, second + c, part);
          }
        }
        for (std::int64_t c = 0; c < columns; ++c) {
          args.first[c0 + c] += static_cast<double>(first[c]);
          args.second[c0 + c] += static_cast<double>(second[c]);
        }
      }
    }
  }
};

struct MapColumns {
  static constexpr std::int64_t kLongRow = 4096;  // bytes

  // kVectors registers of columns from i on, of kRows rows from r on, which share one load of the coefficients.
  template <typename scalar_t, typename acc_t, typename Op, int kRows, int kVectors, bool kStream, typename Lanes>
  BNEXT_INLINE static void map(const MapArgs& args, const Setup& setup, std::int64_t r, std::int64_t i, Lanes lanes) {
    constexpr std::int64_t kN = kWidth<acc_t>;
    Vec<acc_t> c[kVectors][kMaxCoefficients] = {};
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) load_coefficients<acc_t, Op>(c[u], args.coefficients, i + u * kN, lanes);
#pragma GCC unroll 4
    for (int j = 0; j < kRows; ++j) {
      const Inputs<scalar_t, Op> inputs(args.block, setup, r + j);
      const Outputs<scalar_t, Op> outputs(args, setup, r + j);
      if (args.ahead != 0) inputs.prefetch(setup, i + args.ahead);
      Mapped<Vec<acc_t>> mapped[kVectors];
#pragma GCC unroll 4
      for (int u = 0; u < kVectors; ++u) {
        Vec<acc_t> in[kMaxInputs];
        inputs.template load<acc_t>(in, setup, i + u * kN, lanes);
        mapped[u] = Op::template apply<scalar_t>(in, c[u], setup.epilogue);
      }
      if constexpr (kVectors == kLineVectors<acc_t, scalar_t> && std::is_same_v<Lanes, Whole>) {
        outputs.template store_line_of<acc_t, kStream>(mapped, setup, i);
      } else {
        outputs.template store<acc_t>(mapped[0], setup, i, lanes);
      }
    }
  }

  template <typename scalar_t, typename acc_t, typename Op, int kRows, bool kStream>
  BNEXT_INLINE static void map_rows(const MapArgs& args, const Setup& setup, std::int64_t r) {
    constexpr std::int64_t kN = kWidth<acc_t>;
    constexpr int kVectors = kLineVectors<acc_t, scalar_t>;
    const std::int64_t len = args.block.len;
    std::int64_t i = 0;
    for (; i + kVectors * kN <= len; i += kVectors * kN) {
      map<scalar_t, acc_t, Op, kRows, kVectors, kStream>(args, setup, r, i, Whole{});
    }
    if constexpr (kVectors > 1) {
      for (; i + kN <= len; i += kN) map<scalar_t, acc_t, Op, kRows, 1, false>(args, setup, r, i, Whole{});
    }
    if (i < len) map<scalar_t, acc_t, Op, kRows, 1, false>(args, setup, r, i, Part{static_cast<int>(len - i)});
  }

  // Several rows at a time share the loads of coefficients; so do long ones, which leave no room for these in the
  // first-level cache. Where neither matters, the order does: one row after the other.
  template <typename scalar_t, typename acc_t, typename Op, Form kForm>
  static void run(const MapArgs& call) {
    const MapArgs args = call;  // a copy that no store to an output can be taken to change
    const Setup setup = known_setup<Op, kForm>(args);
    const bool rows_alike = args.block.stride * static_cast<std::int64_t>(sizeof(scalar_t)) % kLineBytes == 0;
    std::int64_t r = 0;
    if constexpr (kNaturally<scalar_t, acc_t>) {
      const Outputs<scalar_t, Op> outputs(args, setup, 0);
      if (args.streams && rows_alike && outputs.can_stream(setup, args.block.stride) &&
          outputs.before_lines(setup) == 0) {
        for (; r < args.block.rows; ++r) map_rows<scalar_t, acc_t, Op, 1, true>(args, setup, r);
        finish_streams();
      }
    }
    if constexpr (kCommon<scalar_t, acc_t, Op, kForm>) {
      const bool long_rows = args.block.len * static_cast<std::int64_t>(sizeof(scalar_t)) >= kLongRow;
      if (!args.in_order || long_rows) {
        for (; r + 4 <= args.block.rows; r += 4) map_rows<scalar_t, acc_t, Op, 4, false>(args, setup, r);
      }
    }
    for (; r < args.block.rows; ++r) map_rows<scalar_t, acc_t, Op, 1, false>(args, setup, r);
  }
};

template <typename acc_t, typename scalar_t, typename Lanes>
BNEXT_INLINE Vec<acc_t> pairwise_mean(const scalar_t* x, const std::int64_t* offsets, int samples, Lanes lanes) {
  const acc_t half = static_cast<acc_t>(0.5);
  Vec<acc_t> level[kMaxSamples] = {};
  for (int i = 0; i < samples; ++i) level[i] = load_vector<acc_t>(x + offsets[i], lanes);
  for (int n = samples; n > 1; n /= 2) {
    for (int i = 0; i < n / 2; ++i) level[i] = average(level[2 * i], level[2 * i + 1], half);
  }
  return level[0];
}

template <typename scalar_t, typename acc_t>
void sample(const SampleArgs& args) {
  constexpr std::int64_t kN = kWidth<acc_t>;
  const auto* x = static_cast<const scalar_t*>(args.in);
  std::int64_t j = 0;
  for (; j + kN <= args.len; j += kN) {
    const auto mean = pairwise_mean<acc_t>(x + j, args.offsets, args.samples, Whole{});
    for (int l = 0; l < kN; ++l) args.shift[j + l] = static_cast<double>(mean[l]);
  }
  if (j < args.len) {
    const Part part{static_cast<int>(args.len - j)};
    const auto mean = pairwise_mean<acc_t>(x + j, args.offsets, args.samples, part);
    for (int l = 0; l < part.n; ++l) args.shift[j + l] = static_cast<double>(mean[l]);
  }
}

#include "channels.inl"

template <typename scalar_t, typename acc_t, typename Op>
void add_reduce(LeafTable& table, DType dtype, Compute compute, ReduceOp op) {
  const int d = static_cast<int>(dtype);
  const int a = static_cast<int>(compute);
  table.reduce_segments[d][a][static_cast<int>(op)] = &run_form<ReduceSegments, scalar_t, acc_t, Op, ReduceArgs>;
  table.reduce_columns[d][a][static_cast<int>(op)] = &run_form<ReduceColumns, scalar_t, acc_t, Op, ReduceArgs>;
}

template <typename scalar_t, typename acc_t, typename Op>
void add_map(LeafTable& table, DType dtype, Compute compute, MapOp op) {
  const int d = static_cast<int>(dtype);
  const int a = static_cast<int>(compute);
  table.map_segments[d][a][static_cast<int>(op)] = &run_form<MapSegments, scalar_t, acc_t, Op, MapArgs>;
  table.map_columns[d][a][static_cast<int>(op)] = &run_form<MapColumns, scalar_t, acc_t, Op, MapArgs>;
}

template <typename scalar_t, typename acc_t>
void fill_table(LeafTable& table, DType dtype, Compute compute) {
  add_reduce<scalar_t, acc_t, MomentSums>(table, dtype, compute, ReduceOp::kMomentSums);
  add_reduce<scalar_t, acc_t, GradSums>(table, dtype, compute, ReduceOp::kGradSums);
  add_reduce<scalar_t, acc_t, BiasGradSum>(table, dtype, compute, ReduceOp::kBiasGradSum);
  add_reduce<scalar_t, acc_t, ActivatedGradSums>(table, dtype, compute, ReduceOp::kActivatedGradSums);
  add_map<scalar_t, acc_t, Normalize>(table, dtype, compute, MapOp::kNormalize);
  add_map<scalar_t, acc_t, GradInput>(table, dtype, compute, MapOp::kGradInput);
  add_map<scalar_t, acc_t, ScaleGrad>(table, dtype, compute, MapOp::kScaleGrad);
  add_map<scalar_t, acc_t, ActivatedNormalize>(table, dtype, compute, MapOp::kActivatedNormalize);
  add_map<scalar_t, acc_t, ActivatedGrad>(table, dtype, compute, MapOp::kActivatedGrad);
}

LeafTable leaf_table() {
  LeafTable table = {};
  fill_table<float, float>(table, DType::kFloat32, Compute::kFloat32);
  fill_table<float, double>(table, DType::kFloat32, Compute::kFloat64);
  fill_table<Half, float>(table, DType::kFloat16, Compute::kFloat32);
  fill_table<Half, double>(table, DType::kFloat16, Compute::kFloat64);
  fill_table<BFloat16, float>(table, DType::kBFloat16, Compute::kFloat32);
  fill_table<BFloat16, double>(table, DType::kBFloat16, Compute::kFloat64);
  fill_table<double, double>(table, DType::kFloat64, Compute::kFloat64);
  table.sample[static_cast<int>(DType::kFloat32)] = &sample<float, float>;
  table.sample[static_cast<int>(DType::kFloat16)] = &sample<Half, float>;
  table.sample[static_cast<int>(DType::kBFloat16)] = &sample<BFloat16, float>;
  table.sample[static_cast<int>(DType::kFloat64)] = &sample<double, double>;
  table.narrow = &narrow_coefficients;
  table.training = kChannelLeaves<TrainingForwardOp>;
  table.evaluation = kChannelLeaves<EvalForwardOp>;
  table.backward = kChannelLeaves<BackwardOp>;
  return table;
}
