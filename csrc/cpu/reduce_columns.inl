// Sums of a block in which each column belongs to one channel.

#include "block_io.inl"
#include "chains.inl"
#include "instantiate.inl"

// Columns are reduced in blocks whose sums stay in the first-level cache. A block is reduced a tile of a few rows at a
// time: the tile's sums are accumulated in registers and then added to the block's.
constexpr std::int64_t kColumnBlock = 1024;
static_assert(kMaxTileRows == kInner);

struct ReduceColumns {
  // Adds rows [t0, t1) of kUnroll registers of columns, from column j of the block on, to the column block's sums.
  template <typename scalar_t, typename acc_t, typename Op, int kUnroll, typename Lanes>
  BNEXT_INLINE static void add(const ReduceArgs& args, const Flags& flags, std::int64_t t0, std::int64_t t1,
                               std::int64_t j, acc_t* first, acc_t* second, Lanes lanes) {
    constexpr std::int64_t kN = kWidth<acc_t>;
    constexpr int kLine = kLineVectors<acc_t, scalar_t>;
    Vec<acc_t> a[kUnroll] = {};
    Vec<acc_t> b[kUnroll] = {};
    Vec<acc_t> k[kUnroll][kMaxReduceCoefficients] = {};
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) load_coefficients<acc_t, Op>(k[u], args.coefficients, j + u * kN, lanes);
    if (args.prefetch_distance != 0) {
      for (std::int64_t r = t0; r < t1; ++r) {
        const Inputs<scalar_t, Op> inputs(args.block, flags, r);
        for (int u = 0; u < kUnroll; u += kLine) inputs.prefetch(flags, j + u * kN + args.prefetch_distance);
      }
    }
    for (std::int64_t r = t0; r < t1; ++r) {
      const Inputs<scalar_t, Op> inputs(args.block, flags, r);
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        Vec<acc_t> in[kMaxInputs];
        inputs.template load<acc_t>(in, flags, j + u * kN, lanes);
        inputs.template leave_out_padding<acc_t>(in, k[u], flags, j + u * kN, lanes);
        Op::template add<scalar_t>(a[u], b[u], in, k[u], flags.epilogue);
      }
    }
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      store_raw(first + u * kN, load_raw<Vec<acc_t>>(first + u * kN) + a[u]);
      store_raw(second + u * kN, load_raw<Vec<acc_t>>(second + u * kN) + b[u]);
    }
  }

  template <typename scalar_t, typename acc_t, typename Op, Specialization kSpecialization>
  static void run(const ReduceArgs& call) {
    constexpr std::int64_t kN = kWidth<acc_t>;
    constexpr int kUnroll = kCommon<scalar_t, acc_t, Op, kSpecialization> ? 4 : 1;
    const ReduceArgs args = call;  // a local copy, which no store to a sum can alias
    const Flags flags = known_flags<Op, kSpecialization>(args);
    alignas(64) acc_t first[kColumnBlock];
    alignas(64) acc_t second[kColumnBlock];
    for (std::int64_t c0 = 0; c0 < args.block.len; c0 += kColumnBlock) {
      const std::int64_t columns = args.block.len - c0 < kColumnBlock ? args.block.len - c0 : kColumnBlock;
      const std::int64_t tile_rows = args.tile_rows;
      const std::int64_t flush_rows = tile_rows * (kInner + kOuter - tile_rows);
      for (std::int64_t r0 = 0; r0 < args.block.rows; r0 += flush_rows) {
        const std::int64_t r1 = args.block.rows - r0 < flush_rows ? args.block.rows : r0 + flush_rows;
        // To the end of the last register: its lanes beyond the columns are added to as well, but never read.
        for (std::int64_t c = 0; c < (columns + kN - 1) / kN * kN; ++c) first[c] = second[c] = 0;
        for (std::int64_t t0 = r0; t0 < r1; t0 += tile_rows) {
          const std::int64_t t1 = r1 - t0 < tile_rows ? r1 : t0 + tile_rows;
          std::int64_t c = 0;
          if constexpr (kUnroll > 1) {
            for (; c + kUnroll * kN <= columns; c += kUnroll * kN) {
              add<scalar_t, acc_t, Op, kUnroll>(args, flags, t0, t1, c0 + c, first + c, second + c, Whole{});
            }
          }
          for (; c + kN <= columns; c += kN) {
            add<scalar_t, acc_t, Op, 1>(args, flags, t0, t1, c0 + c, first + c, second + c, Whole{});
          }
          if (c < columns) {
            const Tail tail{static_cast<int>(columns - c)};
            add<scalar_t, acc_t, Op, 1>(args, flags, t0, t1, c0 + c, first + c, second + c, tail);
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

void add_reduce_columns(KernelTable& table) { fill<ReduceColumns>(table.reduce_columns); }
