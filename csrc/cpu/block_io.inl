// Loads and stores of a block's row, which all microkernels share. Each file of microkernels includes this one, inside
// the namespace of an instruction set and under its target pragma (isa/). These files instantiate no function of the
// standard library: the linker might keep the copy for a newer processor, which an older processor would then call.
#pragma once

#include "specialize.inl"
#include "vec.h"
#include "vec_mask.h"

template <typename acc_t>
using Vec = Vector<acc_t, kWidth<acc_t>>;

// Op's coefficients as vectors: those of columns j, j + 1, ... in one lane each, or those of channel j in every lane.
template <typename acc_t, typename Op, int kMax, typename Lanes>
BNEXT_INLINE void load_coefficients(Vec<acc_t> (&c)[kMax], const void* const (&from)[kMax], std::int64_t j,
                                    Lanes lanes) {
  for (int k = 0; k < Op::kCoefficients; ++k) c[k] = load_vector<acc_t>(static_cast<const acc_t*>(from[k]) + j, lanes);
}
template <typename acc_t, typename Op, int kMax>
BNEXT_INLINE void broadcast_coefficients(Vec<acc_t> (&c)[kMax], const void* const (&from)[kMax], std::int64_t j) {
  for (int k = 0; k < Op::kCoefficients; ++k) c[k] = broadcast(static_cast<const acc_t*>(from[k])[j]);
}

// The inputs of Op in row r of a block, or of the block `behind` elements and `mask_behind` bytes of mask after it.
template <typename scalar_t, typename Op>
struct Inputs {
  const scalar_t* in[kMaxInputs] = {};
  const std::uint8_t* mask = nullptr;
  const std::uint8_t* valid = nullptr;

  BNEXT_INLINE Inputs(const Block& block, const Flags& flags, std::int64_t r, std::int64_t behind = 0,
                      std::int64_t mask_behind = 0) {
    const std::int64_t at = behind + r * block.stride;
    // An input that Op does not read may be null: no address is computed from it.
    if (Op::kReadsInput && flags.input) in[0] = static_cast<const scalar_t*>(block.in[0]) + at;
    if (Op::kReadsGrad) in[1] = static_cast<const scalar_t*>(block.in[1]) + at;
    if (Op::kActivated && flags.epilogue.has_residual) in[2] = static_cast<const scalar_t*>(block.in[2]) + at;
    if (Op::kActivated && flags.epilogue.has_mask) mask = block.mask + mask_behind + r * block.mask_stride;
    if (flags.has_padding) valid = block.valid + r * block.valid_stride;
  }

  // Loads a register of each input that Op reads, from element i on, which is a multiple of a register's lanes.
  template <typename acc_t, typename Lanes>
  BNEXT_INLINE void load(Vec<acc_t> (&v)[kMaxInputs], const Flags& flags, std::int64_t i, Lanes lanes) const {
    using V = Vec<acc_t>;
    if constexpr (Op::kReadsInput) v[0] = flags.input ? load_vector<acc_t>(in[0] + i, lanes) : V{};
    if constexpr (Op::kReadsGrad) v[1] = load_vector<acc_t>(in[1] + i, lanes);
    if constexpr (Op::kActivated) {
      if (flags.epilogue.has_mask) {
        v[2] = from_bits<V>(load_mask<kWidth<acc_t>>(mask, i, lanes));
      } else if (flags.epilogue.has_residual) {
        v[2] = load_vector<acc_t>(in[2] + i, lanes);
      } else {
        v[2] = V{};
      }
    }
  }

  // Replaces padding by values that add nothing to a sum: the input by the shift c[0], the other inputs by 0.
  template <typename acc_t, typename Lanes>
  BNEXT_INLINE void leave_out_padding(Vec<acc_t> (&v)[kMaxInputs], const Vec<acc_t> (&c)[kMaxReduceCoefficients],
                                      const Flags& flags, std::int64_t i, Lanes lanes) const {
    if (!flags.has_padding) return;
    const std::uint32_t keeps = load_mask<kWidth<acc_t>>(valid, i, lanes);
    if constexpr (Op::kReadsInput) v[0] = select(keeps, v[0], c[0]);
    if constexpr (Op::kReadsGrad) v[1] = select(keeps, v[1], Vec<acc_t>{});
    if constexpr (Op::kActivated) v[2] = select(keeps, v[2], Vec<acc_t>{});
  }

  // Replaces the results of padding by 0.
  template <typename acc_t, typename Lanes>
  BNEXT_INLINE Mapped<Vec<acc_t>> without_padding(const Mapped<Vec<acc_t>>& mapped, const Flags& flags, std::int64_t i,
                                                  Lanes lanes) const {
    if (!flags.has_padding) return mapped;
    const std::uint32_t keeps = load_mask<kWidth<acc_t>>(valid, i, lanes);
    return {select(keeps, mapped.first, Vec<acc_t>{}), select(keeps, mapped.second, Vec<acc_t>{})};
  }

  // Loads two registers of each input, all in the same order of elements (load_two_vectors). Not for calls with a mask.
  template <typename acc_t>
  BNEXT_INLINE void load_two(Vec<acc_t> (&v)[2][kMaxInputs], const Flags& flags, std::int64_t i) const {
    Vec<acc_t> two[kMaxInputs][2] = {};
    if (Op::kReadsInput && flags.input) load_two_vectors<acc_t>(in[0] + i, two[0]);
    if (Op::kReadsGrad) load_two_vectors<acc_t>(in[1] + i, two[1]);
    if (Op::kActivated && flags.epilogue.has_residual) load_two_vectors<acc_t>(in[2] + i, two[2]);
    for (int k = 0; k < kMaxInputs; ++k) {
      for (int h = 0; h < 2; ++h) v[h][k] = two[k][h];
    }
  }

  // Prefetches the cache line of element i, which may lie outside the row.
  BNEXT_INLINE void prefetch(const Flags& flags, std::int64_t i) const {
    if (Op::kReadsInput && flags.input) __builtin_prefetch(in[0] + i, 0, 2);
    if (Op::kReadsGrad) __builtin_prefetch(in[1] + i, 0, 2);
    if (Op::kActivated && flags.epilogue.has_residual) __builtin_prefetch(in[2] + i, 0, 2);
  }
};

// The beginning of a cache line of each output: one row writes it here, and the next row completes the line.
template <typename scalar_t>
struct OpenLine {
  alignas(kLineBytes) scalar_t out[2][kLineElements<scalar_t>];
  std::int64_t filled = 0;  // elements
};

// Where the results of Op in row r of a block go.
template <typename scalar_t, typename Op>
struct Outputs {
  scalar_t* out[2] = {};
  std::uint8_t* mask = nullptr;

  BNEXT_INLINE Outputs(const MapArgs& args, const Flags& flags, std::int64_t r) {
    if (flags.first) out[0] = static_cast<scalar_t*>(args.out[0]) + r * args.block.stride;
    if (flags.second) out[1] = static_cast<scalar_t*>(args.out[1]) + r * args.block.stride;
    if (flags.writes_mask) mask = args.block.mask + r * args.block.mask_stride;
  }

  // Prefetches the cache line of element i for writing; the element may lie outside the row.
  BNEXT_INLINE void write_prefetch(const Flags& flags, std::int64_t i) const {
    if (flags.first) __builtin_prefetch(out[0] + i, 1, 3);
    if (flags.second) __builtin_prefetch(out[1] + i, 1, 3);
  }

  // How many elements of this row come before its first whole line.
  BNEXT_INLINE std::int64_t before_lines(const Flags& flags) const {
    return before_line(flags.first ? out[0] : out[1]);
  }

  // Whether whole lines of this row, and of others `stride` apart, can be stored non-temporally: both outputs must have
  // the same offset within a line, and with a mask or padding, whose bits start with a row, rows must start at a line.
  BNEXT_INLINE bool can_store_non_temporal(const Flags& flags, std::int64_t stride) const {
    const bool agree = !flags.second || before_lines(flags) == before_line(out[1]);
    const bool has_mask = flags.writes_mask || flags.epilogue.has_mask || flags.has_padding;
    return agree && (!has_mask || (before_lines(flags) == 0 && stride % kLineElements<scalar_t> == 0));
  }

  // Redirects the results of the elements from i on into an open line.
  BNEXT_INLINE Outputs into(OpenLine<scalar_t>& line, const Flags& flags, std::int64_t i) const {
    Outputs to = *this;
    if (flags.first) to.out[0] = line.out[0] + (line.filled - i);
    if (flags.second) to.out[1] = line.out[1] + (line.filled - i);
    return to;
  }

  // Stores an open line that is full, and ends before element i, past the caches.
  BNEXT_INLINE void close(OpenLine<scalar_t>& line, const Flags& flags, std::int64_t i) const {
    if (flags.first) store_line_non_temporal(out[0] + i - kLineElements<scalar_t>, line.out[0]);
    if (flags.second) store_line_non_temporal(out[1] + i - kLineElements<scalar_t>, line.out[1]);
    line.filled = 0;
  }

  template <typename acc_t, typename Lanes>
  BNEXT_INLINE void store(const Mapped<Vec<acc_t>>& mapped, const Flags& flags, std::int64_t i, Lanes lanes) const {
    if (flags.first) store_vector<acc_t>(out[0] + i, mapped.first, lanes);
    if (flags.second) store_vector<acc_t>(out[1] + i, mapped.second, lanes);
    if (flags.writes_mask) store_mask<kWidth<acc_t>>(mask, i, open_bits(mapped.second), lanes);
  }

  // Stores a line's worth of results; past the caches if kNonTemporal.
  template <typename acc_t, bool kNonTemporal>
  BNEXT_INLINE void store_line_of(const Mapped<Vec<acc_t>> (&mapped)[kLineVectors<acc_t, scalar_t>], const Flags& flags,
                                  std::int64_t i) const {
    constexpr int kVectors = kLineVectors<acc_t, scalar_t>;
    const auto put = [](scalar_t* to, const Vec<acc_t>(&line)[kVectors]) {
      if constexpr (kNonTemporal) {
        alignas(kLineBytes) scalar_t packed[kLineElements<scalar_t>];
        store_line<acc_t>(packed, line);
        store_line_non_temporal(to, packed);
      } else {
        store_line<acc_t>(to, line);
      }
    };
    Vec<acc_t> line[kVectors];
    if (flags.first) {
      for (int u = 0; u < kVectors; ++u) line[u] = mapped[u].first;
      put(out[0] + i, line);
    }
    if (flags.second) {
      for (int u = 0; u < kVectors; ++u) line[u] = mapped[u].second;
      put(out[1] + i, line);
    }
    if (flags.writes_mask) {
      for (int u = 0; u < kVectors; ++u) {
        store_mask<kWidth<acc_t>>(mask, i + u * kWidth<acc_t>, open_bits(mapped[u].second));
      }
    }
  }

 private:
  BNEXT_INLINE static std::int64_t before_line(const scalar_t* to) {
    const auto beyond = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(to) % kLineBytes);
    return (kLineBytes - beyond) % kLineBytes / static_cast<std::int64_t>(sizeof(scalar_t));
  }
};
