// Maps a block in which each column belongs to one channel.

#include "block_io.inl"
#include "instantiate.inl"

struct MapColumns {
  static constexpr std::int64_t kLongRow = 4096;  // bytes

  // Maps kVectors registers of columns from i on in kRows rows from r on. The rows share one load of the coefficients.
  template <typename scalar_t, typename acc_t, typename Op, int kRows, int kVectors, bool kNonTemporal, typename Lanes>
  BNEXT_INLINE static void map(const MapArgs& args, const Flags& flags, std::int64_t r, std::int64_t i, Lanes lanes) {
    constexpr std::int64_t kN = kWidth<acc_t>;
    Vec<acc_t> c[kVectors][kMaxCoefficients] = {};
#pragma GCC unroll 4
    for (int u = 0; u < kVectors; ++u) load_coefficients<acc_t, Op>(c[u], args.coefficients, i + u * kN, lanes);
#pragma GCC unroll 4
    for (int j = 0; j < kRows; ++j) {
      const Inputs<scalar_t, Op> inputs(args.block, flags, r + j);
      const Outputs<scalar_t, Op> outputs(args, flags, r + j);
      if (args.prefetch_distance != 0) inputs.prefetch(flags, i + args.prefetch_distance);
      // Stores that miss the first-level cache wait one after the other, and hardware does not prefetch for several
      // rows at a time.
      if constexpr (kRows > 1) outputs.write_prefetch(flags, i + kLineElements<scalar_t>);
      Mapped<Vec<acc_t>> mapped[kVectors];
#pragma GCC unroll 4
      for (int u = 0; u < kVectors; ++u) {
        Vec<acc_t> in[kMaxInputs];
        inputs.template load<acc_t>(in, flags, i + u * kN, lanes);
        mapped[u] = inputs.template without_padding<acc_t>(Op::template apply<scalar_t>(in, c[u], flags.epilogue),
                                                           flags, i + u * kN, lanes);
      }
      if constexpr (kVectors == kLineVectors<acc_t, scalar_t> && std::is_same_v<Lanes, Whole>) {
        outputs.template store_line_of<acc_t, kNonTemporal>(mapped, flags, i);
      } else {
        outputs.template store<acc_t>(mapped[0], flags, i, lanes);
      }
    }
  }

  template <typename scalar_t, typename acc_t, typename Op, int kRows, bool kNonTemporal>
  BNEXT_INLINE static void map_rows(const MapArgs& args, const Flags& flags, std::int64_t r) {
    constexpr std::int64_t kN = kWidth<acc_t>;
    constexpr int kVectors = kLineVectors<acc_t, scalar_t>;
    const std::int64_t len = args.block.len;
    std::int64_t i = 0;
    for (; i + kVectors * kN <= len; i += kVectors * kN) {
      map<scalar_t, acc_t, Op, kRows, kVectors, kNonTemporal>(args, flags, r, i, Whole{});
    }
    if constexpr (kVectors > 1) {
      for (; i + kN <= len; i += kN) map<scalar_t, acc_t, Op, kRows, 1, false>(args, flags, r, i, Whole{});
    }
    if (i < len) map<scalar_t, acc_t, Op, kRows, 1, false>(args, flags, r, i, Tail{static_cast<int>(len - i)});
  }

  // Four rows at a time share the loads of their coefficients. With in_order, memory order matters more, and rows are
  // taken one by one; but not long rows, whose coefficients would be evicted from the first-level cache between rows.
  template <typename scalar_t, typename acc_t, typename Op, Specialization kSpecialization>
  static void run(const MapArgs& call) {
    const MapArgs args = call;  // a local copy, which no store to an output can alias
    const Flags flags = known_flags<Op, kSpecialization>(args);
    const bool rows_alike = args.block.stride * static_cast<std::int64_t>(sizeof(scalar_t)) % kLineBytes == 0;
    std::int64_t r = 0;
    if constexpr (kIsOpmath<scalar_t, acc_t>) {
      const Outputs<scalar_t, Op> outputs(args, flags, 0);
      if (args.non_temporal && rows_alike && outputs.can_store_non_temporal(flags, args.block.stride) &&
          outputs.before_lines(flags) == 0) {
        for (; r < args.block.rows; ++r) map_rows<scalar_t, acc_t, Op, 1, true>(args, flags, r);
        non_temporal_fence();
      }
    }
    if constexpr (kCommon<scalar_t, acc_t, Op, kSpecialization>) {
      const bool long_rows = args.block.len * static_cast<std::int64_t>(sizeof(scalar_t)) >= kLongRow;
      if (!args.in_order || long_rows) {
        for (; r + 4 <= args.block.rows; r += 4) map_rows<scalar_t, acc_t, Op, 4, false>(args, flags, r);
      }
    }
    for (; r < args.block.rows; ++r) map_rows<scalar_t, acc_t, Op, 1, false>(args, flags, r);
  }
};

void add_map_columns(KernelTable& table) { fill<MapColumns>(table.map_columns); }
