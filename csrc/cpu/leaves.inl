// The leaves themselves. Each isa_*.cpp includes this file once, inside its own namespace and under its target
// pragma; nothing of the standard library is instantiated here, so that no function compiled for a newer
// processor can be merged with a copy that an older one calls.

#include "rows.inl"

// Sums have three levels, so that no chain of float32 additions is long: a lane takes kInner of them and is then
// added to an outer lane, which takes kOuter of those and is then added to a double. Equal values round the same way
// at every step, so the error of a single chain of 128 would reach 128 * 2^-25; here it is (16 + 8) * 2^-25.
constexpr std::int64_t kInner = 16;
constexpr std::int64_t kOuter = 8;

// The coefficients of element j; of all elements alike, where they belong to one channel.
template <typename V, typename acc_t, typename Op, int kMax>
BNEXT_INLINE void load_coefficients(V (&c)[kMax], const void* const (&from)[kMax], std::int64_t j) {
  for (int k = 0; k < Op::kCoefficients; ++k) c[k] = load_raw<V>(static_cast<const acc_t*>(from[k]) + j);
}
template <typename acc_t, typename Op, int kMax>
BNEXT_INLINE void broadcast_coefficients(Vec<acc_t> (&c)[kMax], const void* const (&from)[kMax]) {
  for (int k = 0; k < Op::kCoefficients; ++k) c[k] = broadcast(*static_cast<const acc_t*>(from[k]));
}
template <typename acc_t, int kMax>
BNEXT_INLINE void first_lanes(acc_t (&c)[kMax], const Vec<acc_t> (&v)[kMax]) {
  for (int k = 0; k < kMax; ++k) c[k] = v[k][0];
}

// The two sums of a channel: kUnroll registers each, so that additions do not wait for one another.
template <typename acc_t, typename scalar_t, typename Op>
struct Lanes {
  static constexpr int kUnroll = 4;
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

  BNEXT_INLINE Lanes(const ReduceArgs& args, const Setup& setup) : setup(setup) {
    broadcast_coefficients<acc_t, Op>(c, args.coefficients);
  }

  BNEXT_INLINE void add_vector(int u, const Inputs<scalar_t, Op>& inputs, std::int64_t i) {
    Vec<acc_t> in[kMaxInputs];
    inputs.template load<acc_t>(in, setup, i);
    Op::template add<Natural<scalar_t>>(first[u], second[u], in, c, setup.epilogue);
  }

  // Elements [i, n), at most kInner * kStep of them.
  BNEXT_INLINE void add_run(const Inputs<scalar_t, Op>& inputs, std::int64_t i, std::int64_t n) {
    inner += (n - i) / kStep + 1;
    for (; i + kStep <= n; i += kStep) {
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) add_vector(u, inputs, i + u * kN);
    }
    // What is left fills fewer than kUnroll registers; each goes to a register of its own.
    if (i + kN <= n) add_vector(0, inputs, i), i += kN;
    if (i + kN <= n) add_vector(1, inputs, i), i += kN;
    if (i + kN <= n) add_vector(2, inputs, i), i += kN;
    acc_t cs[kMaxReduceCoefficients];
    first_lanes(cs, c);
    for (; i < n; ++i) {
      acc_t in[kMaxInputs];
      acc_t a = 0;
      acc_t b = 0;
      inputs.template load<acc_t>(in, setup, i);
      Op::template add<Natural<scalar_t>>(a, b, in, cs, setup.epilogue);
      first_total += static_cast<double>(a);
      second_total += static_cast<double>(b);
    }
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
    using Sums = Lanes<acc_t, scalar_t, Op>;
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

// The whole vectors of a row of one channel; what comes after them begins at what is returned.
template <typename acc_t, bool kStream, typename scalar_t, typename Op>
BNEXT_INLINE std::int64_t map_vectors(const Inputs<scalar_t, Op>& inputs, const Outputs<scalar_t, Op>& outputs,
                                      const Vec<acc_t> (&c)[kMaxCoefficients], const Setup& setup, std::int64_t len) {
  constexpr std::int64_t kN = kWidth<acc_t>;
  std::int64_t i = 0;
#pragma GCC unroll 4
  for (; i + kN <= len; i += kN) {
    Vec<acc_t> in[kMaxInputs];
    inputs.template load<acc_t>(in, setup, i);
    outputs.template store<acc_t, kStream>(Op::template apply<Natural<scalar_t>>(in, c, setup.epilogue), setup, i);
  }
  return i;
}

struct MapSegments {
  template <typename scalar_t, typename acc_t, typename Op, Form kForm>
  static void run(const MapArgs& args) {
    const Setup setup = known_setup<Op, kForm>(args);
    Vec<acc_t> cv[kMaxCoefficients] = {};
    broadcast_coefficients<acc_t, Op>(cv, args.coefficients);
    acc_t c[kMaxCoefficients];
    first_lanes(c, cv);
    const std::int64_t len = args.block.len;
    for (std::int64_t r = 0; r < args.block.rows; ++r) {
      const Inputs<scalar_t, Op> inputs(args.block, setup, r);
      const Outputs<scalar_t, Op> outputs(args, setup, r);
      const bool streams = args.streams && outputs.template aligned<acc_t>(setup);
      std::int64_t i = streams ? map_vectors<acc_t, true>(inputs, outputs, cv, setup, len)
                               : map_vectors<acc_t, false>(inputs, outputs, cv, setup, len);
      for (; i < len; ++i) {
        acc_t in[kMaxInputs];
        inputs.template load<acc_t>(in, setup, i);
        outputs.template store<acc_t, false>(Op::template apply<Natural<scalar_t>>(in, c, setup.epilogue), setup, i);
      }
    }
    if (args.streams) finish_streams();
  }
};

// Columns are reduced in slabs whose sums stay in the first-level cache; inside a slab a tile of a few rows at a
// time, whose sums are made in registers and then added to the slab's.
constexpr std::int64_t kSlabColumns = 1024;
constexpr std::int64_t kSlabBytes = 16384;

struct ReduceColumns {
  template <typename scalar_t, typename acc_t, typename Op, Form kForm>
  static void run(const ReduceArgs& call) {
    constexpr std::int64_t kN = kWidth<acc_t>;
    constexpr int kUnroll = 4;
    constexpr int kC = kMaxReduceCoefficients;
    const ReduceArgs args = call;  // a copy that no store to a sum can be taken to change
    const Setup setup = known_setup<Op, kForm>(args);
    alignas(64) acc_t first[kSlabColumns];
    alignas(64) acc_t second[kSlabColumns];
    for (std::int64_t c0 = 0; c0 < args.block.len; c0 += kSlabColumns) {
      const std::int64_t columns = args.block.len - c0 < kSlabColumns ? args.block.len - c0 : kSlabColumns;
      const std::int64_t wanted = kSlabBytes / (columns * static_cast<std::int64_t>(sizeof(scalar_t)) * kInputs<Op>);
      const std::int64_t tile_rows = wanted < 4 ? 4 : wanted > kInner ? kInner : wanted;
      const std::int64_t flush_rows = tile_rows * kOuter;
      for (std::int64_t r0 = 0; r0 < args.block.rows; r0 += flush_rows) {
        const std::int64_t r1 = args.block.rows - r0 < flush_rows ? args.block.rows : r0 + flush_rows;
        for (std::int64_t c = 0; c < columns; ++c) first[c] = second[c] = 0;
        for (std::int64_t t0 = r0; t0 < r1; t0 += tile_rows) {
          const std::int64_t t1 = r1 - t0 < tile_rows ? r1 : t0 + tile_rows;
          std::int64_t c = 0;
          for (; c + kUnroll * kN <= columns; c += kUnroll * kN) {
            Vec<acc_t> a[kUnroll] = {};
            Vec<acc_t> b[kUnroll] = {};
            Vec<acc_t> k[kUnroll][kC] = {};
#pragma GCC unroll 4
            for (int u = 0; u < kUnroll; ++u) {
              load_coefficients<Vec<acc_t>, acc_t, Op>(k[u], args.coefficients, c0 + c + u * kN);
            }
            for (std::int64_t r = t0; r < t1; ++r) {
              const Inputs<scalar_t, Op> inputs(args.block, setup, r);
#pragma GCC unroll 4
              for (int u = 0; u < kUnroll; ++u) {
                Vec<acc_t> in[kMaxInputs];
                inputs.template load<acc_t>(in, setup, c0 + c + u * kN);
                Op::template add<Natural<scalar_t>>(a[u], b[u], in, k[u], setup.epilogue);
              }
            }
#pragma GCC unroll 4
            for (int u = 0; u < kUnroll; ++u) {
              store_raw(first + c + u * kN, load_raw<Vec<acc_t>>(first + c + u * kN) + a[u]);
              store_raw(second + c + u * kN, load_raw<Vec<acc_t>>(second + c + u * kN) + b[u]);
            }
          }
          for (; c + kN <= columns; c += kN) {
            Vec<acc_t> a = {};
            Vec<acc_t> b = {};
            Vec<acc_t> k[kC] = {};
            load_coefficients<Vec<acc_t>, acc_t, Op>(k, args.coefficients, c0 + c);
            for (std::int64_t r = t0; r < t1; ++r) {
              Vec<acc_t> in[kMaxInputs];
              Inputs<scalar_t, Op>(args.block, setup, r).template load<acc_t>(in, setup, c0 + c);
              Op::template add<Natural<scalar_t>>(a, b, in, k, setup.epilogue);
            }
            store_raw(first + c, load_raw<Vec<acc_t>>(first + c) + a);
            store_raw(second + c, load_raw<Vec<acc_t>>(second + c) + b);
          }
          for (; c < columns; ++c) {
            acc_t a = 0;
            acc_t b = 0;
            acc_t k[kC] = {};
            load_coefficients<acc_t, acc_t, Op>(k, args.coefficients, c0 + c);
            for (std::int64_t r = t0; r < t1; ++r) {
              acc_t in[kMaxInputs];
              Inputs<scalar_t, Op>(args.block, setup, r).template load<acc_t>(in, setup, c0 + c);
              Op::template add<Natural<scalar_t>>(a, b, in, k, setup.epilogue);
            }
            first[c] += a;
            second[c] += b;
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

// V: acc_t, for column i of kRows rows from r on, or Vec<acc_t>, for those from i on.
template <typename V, typename scalar_t, typename acc_t, typename Op, int kRows, bool kStream>
BNEXT_INLINE void map_column(const MapArgs& args, const Setup& setup, std::int64_t r, std::int64_t i) {
  V c[kMaxCoefficients] = {};
  load_coefficients<V, acc_t, Op>(c, args.coefficients, i);
#pragma GCC unroll 4
  for (int j = 0; j < kRows; ++j) {
    V in[kMaxInputs];
    Inputs<scalar_t, Op>(args.block, setup, r + j).template load<acc_t>(in, setup, i);
    const auto mapped = Op::template apply<Natural<scalar_t>>(in, c, setup.epilogue);
    Outputs<scalar_t, Op>(args, setup, r + j).template store<acc_t, kStream>(mapped, setup, i);
  }
}

template <typename scalar_t, typename acc_t, typename Op, int kRows, bool kStream>
BNEXT_INLINE void map_rows(const MapArgs& args, const Setup& setup, std::int64_t r) {
  constexpr std::int64_t kN = kWidth<acc_t>;
  std::int64_t i = 0;
  for (; i + kN <= args.block.len; i += kN) {
    map_column<Vec<acc_t>, scalar_t, acc_t, Op, kRows, kStream>(args, setup, r, i);
  }
  for (; i < args.block.len; ++i) map_column<acc_t, scalar_t, acc_t, Op, kRows, false>(args, setup, r, i);
}

struct MapColumns {
  // Several rows at once share one load of the coefficients.
  template <typename scalar_t, typename acc_t, typename Op, Form kForm>
  static void run(const MapArgs& call) {
    constexpr int kRows = 4;
    const MapArgs args = call;  // a copy that no store to an output can be taken to change
    const Setup setup = known_setup<Op, kForm>(args);
    const bool rows_alike = args.block.stride % kWidth<acc_t> == 0;
    const bool streams =
        args.streams && rows_alike && Outputs<scalar_t, Op>(args, setup, 0).template aligned<acc_t>(setup);
    std::int64_t r = 0;
    for (; r + kRows <= args.block.rows; r += kRows) {
      streams ? map_rows<scalar_t, acc_t, Op, kRows, true>(args, setup, r)
              : map_rows<scalar_t, acc_t, Op, kRows, false>(args, setup, r);
    }
    for (; r < args.block.rows; ++r) map_rows<scalar_t, acc_t, Op, 1, false>(args, setup, r);
    if (streams) finish_streams();
  }
};

// V: acc_t or Vec<acc_t>.
template <typename V, typename acc_t, typename scalar_t>
BNEXT_INLINE V pairwise_mean(const scalar_t* x, const std::int64_t* offsets, int samples) {
  const acc_t half = static_cast<acc_t>(0.5);
  V level[kMaxSamples] = {};
  for (int i = 0; i < samples; ++i) level[i] = load_as<V, acc_t>(x + offsets[i]);
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
    const auto mean = pairwise_mean<Vec<acc_t>, acc_t>(x + j, args.offsets, args.samples);
    for (int l = 0; l < kN; ++l) args.shift[j + l] = static_cast<double>(mean[l]);
  }
  for (; j < args.len; ++j) {
    args.shift[j] = static_cast<double>(pairwise_mean<acc_t, acc_t>(x + j, args.offsets, args.samples));
  }
}

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
  return table;
}
