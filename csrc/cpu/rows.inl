// A row of a block, as a functor reads and writes it: what all leaves share. Each file of leaves includes it, inside
// the namespace of an instruction set and under its target pragma (isa/). Nothing of the standard library is
// instantiated in these files, so that no function compiled for a newer processor can be merged with a copy that an
// older one calls.
#pragma once

#include "vec.h"

template <typename acc_t>
using Vec = Vector<acc_t, kWidth<acc_t>>;

// The way that nearly all data takes: what it gains by streaming and unrolling is worth its code.
template <typename scalar_t, typename acc_t>
constexpr bool kNaturally = std::is_same_v<acc_t, Natural<scalar_t>>;

template <typename Op>
constexpr int kInputs = int{Op::kReadsInput} + int{Op::kReadsGrad} + int{Op::kActivated};

// What an activated functor is to do, and which of its optional inputs and outputs there are.
struct Setup {
  Epilogue epilogue;
  bool input = true;  // with a mask it may be gone
  bool first = true;
  bool second = false;
  bool writes_mask = false;
};

// Common forms are compiled with a Setup of constants, all the rest with what the call says: an activation, and flags
// above it.
using Form = unsigned;
constexpr Form flags_above(Form values) {
  Form flag = 1;
  while (flag < values) flag *= 2;
  return flag;
}
constexpr Form kResidual = flags_above(kActCount);
static_assert(kActCount <= kResidual, "an activation must not be taken for a flag");
constexpr Form kMask = 2 * kResidual;
constexpr Form kSecond = 2 * kMask;
constexpr Form kStatistics = 2 * kSecond;
constexpr Form kIncomplete = 2 * kStatistics;
constexpr Form kAny = ~0u;
constexpr Form kRelu = static_cast<Form>(Act::kRelu);
constexpr Form kRelu6 = static_cast<Form>(Act::kRelu6);
constexpr Form kSilu = static_cast<Form>(Act::kSilu);
constexpr Form kGelu = static_cast<Form>(Act::kGelu);
constexpr Form kHardswish = static_cast<Form>(Act::kHardswish);

template <typename Op>
BNEXT_INLINE constexpr Setup form_setup(Form form) {
  Setup setup;
  setup.epilogue.activation.act = static_cast<Act>(form % kResidual);
  setup.epilogue.has_residual = (form & kResidual) != 0;
  setup.epilogue.has_mask = Op::kReadsGrad && (form & kMask) != 0;
  setup.epilogue.differentiates_statistics = (form & kStatistics) != 0;
  setup.second = (form & kSecond) != 0;
  setup.writes_mask = !Op::kReadsGrad && (form & kMask) != 0;
  return setup;
}

template <typename Op>
BNEXT_INLINE Setup setup_of(const ReduceArgs& args) {
  Setup setup;
  if constexpr (Op::kActivated) {
    setup.epilogue = args.epilogue;
    setup.epilogue.differentiates_statistics = false;  // of no concern to sums
    setup.input = args.block.in[0] != nullptr;
  }
  return setup;
}

template <typename Op>
BNEXT_INLINE Setup setup_of(const MapArgs& args) {
  Setup setup;
  if constexpr (Op::kActivated) {
    setup.epilogue = args.epilogue;
    setup.input = args.block.in[0] != nullptr;
    setup.first = args.out[0] != nullptr;
    setup.second = args.out[1] != nullptr;
    setup.writes_mask = !Op::kReadsGrad && args.block.mask != nullptr;
  }
  return setup;
}

template <typename Op, Form kForm, typename Args>
BNEXT_INLINE Setup known_setup(const Args& args) {
  if constexpr (kForm == kAny) {
    return setup_of<Op>(args);
  } else {
    return form_setup<Op>(kForm);
  }
}

// The form that a Setup is of; more than any if an input or output is missing that forms count on.
BNEXT_INLINE Form form_of(const Setup& setup) {
  const Epilogue& epilogue = setup.epilogue;
  Form form = static_cast<Form>(epilogue.activation.act);
  form |= epilogue.has_residual ? kResidual : 0;
  form |= epilogue.has_mask || setup.writes_mask ? kMask : 0;
  form |= setup.second ? kSecond : 0;
  form |= epilogue.differentiates_statistics ? kStatistics : 0;
  return setup.input && setup.first ? form : form | kIncomplete;
}

template <typename Op>
constexpr Form kForms[] = {kAny};
template <>
inline constexpr Form kForms<ActivatedNormalize>[] = {
    kRelu, kRelu | kResidual, kRelu | kMask, kRelu | kResidual | kMask, kRelu6, kSilu, kGelu, kHardswish};
template <>
inline constexpr Form kForms<ActivatedGradSums>[] = {kRelu, kRelu | kMask, kRelu6, kSilu, kGelu, kHardswish};
template <>
inline constexpr Form kForms<ActivatedGrad>[] = {kRelu | kStatistics,  kRelu | kStatistics | kMask | kSecond,
                                                 kRelu6 | kStatistics, kSilu | kStatistics,
                                                 kGelu | kStatistics,  kHardswish | kStatistics};

template <typename Leaf, typename scalar_t, typename acc_t, typename Op, int kIndex, typename Args>
BNEXT_INLINE void run_known(const Args& args, Form form) {
  if constexpr (kIndex < static_cast<int>(sizeof kForms<Op> / sizeof(Form))) {
    constexpr Form kForm = kForms<Op>[kIndex];
    if (form == kForm) return Leaf::template run<scalar_t, acc_t, Op, kForm>(args);
    run_known<Leaf, scalar_t, acc_t, Op, kIndex + 1>(args, form);
  } else {
    Leaf::template run<scalar_t, acc_t, Op, kAny>(args);
  }
}

// Runs the leaf in the form of this call. Leaf: a struct whose run() is the leaf.
template <typename Leaf, typename scalar_t, typename acc_t, typename Op, typename Args>
void run_form(const Args& args) {
  if constexpr (Op::kActivated && sizeof(acc_t) == sizeof(float)) {
    run_known<Leaf, scalar_t, acc_t, Op, 0>(args, form_of(setup_of<Op>(args)));
  } else {
    Leaf::template run<scalar_t, acc_t, Op, kAny>(args);
  }
}

// What is worth unrolling: the way that nearly all data takes. The rest is a good part of the code, and compiles in a
// fraction of the time without. Not where it would change a sum's order: a gradient's bits must not depend on which
// others are asked for, and so on the form.
template <typename scalar_t, typename acc_t, typename Op, Form kForm>
constexpr bool kCommon = kNaturally<scalar_t, acc_t> && (!Op::kActivated || kForm != kAny);

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

// What Op reads of row r of a block.
template <typename scalar_t, typename Op>
struct Inputs {
  const scalar_t* in[kMaxInputs] = {};
  const std::uint8_t* mask = nullptr;

  BNEXT_INLINE Inputs(const Block& block, const Setup& setup, std::int64_t r) {
    // One that is not read may be null and stays so.
    if (Op::kReadsInput && setup.input) in[0] = static_cast<const scalar_t*>(block.in[0]) + r * block.stride;
    if (Op::kReadsGrad) in[1] = static_cast<const scalar_t*>(block.in[1]) + r * block.stride;
    if (Op::kActivated && setup.epilogue.has_residual) {
      in[2] = static_cast<const scalar_t*>(block.in[2]) + r * block.stride;
    }
    if (Op::kActivated && setup.epilogue.has_mask) mask = block.mask + r * block.mask_stride;
  }

  // Those of the lanes from element i on, a multiple of a register's.
  template <typename acc_t, typename Lanes>
  BNEXT_INLINE void load(Vec<acc_t> (&v)[kMaxInputs], const Setup& setup, std::int64_t i, Lanes lanes) const {
    using V = Vec<acc_t>;
    if constexpr (Op::kReadsInput) v[0] = setup.input ? load_vector<acc_t>(in[0] + i, lanes) : V{};
    if constexpr (Op::kReadsGrad) v[1] = load_vector<acc_t>(in[1] + i, lanes);
    if constexpr (Op::kActivated) {
      if (setup.epilogue.has_mask) {
        v[2] = from_bits<V>(load_mask<kWidth<acc_t>>(mask, i, lanes));
      } else if (setup.epilogue.has_residual) {
        v[2] = load_vector<acc_t>(in[2] + i, lanes);
      } else {
        v[2] = V{};
      }
    }
  }

  // Those of two registers, in the same order for each input; there is no mask.
  template <typename acc_t>
  BNEXT_INLINE void load_two(Vec<acc_t> (&v)[2][kMaxInputs], const Setup& setup, std::int64_t i) const {
    Vec<acc_t> two[kMaxInputs][2] = {};
    if (Op::kReadsInput && setup.input) load_two_vectors<acc_t>(in[0] + i, two[0]);
    if (Op::kReadsGrad) load_two_vectors<acc_t>(in[1] + i, two[1]);
    if (Op::kActivated && setup.epilogue.has_residual) load_two_vectors<acc_t>(in[2] + i, two[2]);
    for (int k = 0; k < kMaxInputs; ++k) {
      for (int h = 0; h < 2; ++h) v[h][k] = two[k][h];
    }
  }

  // Asks for the cache line of element i, which need not be the row's.
  BNEXT_INLINE void prefetch(const Setup& setup, std::int64_t i) const {
    if (Op::kReadsInput && setup.input) __builtin_prefetch(in[0] + i, 0, 2);
    if (Op::kReadsGrad) __builtin_prefetch(in[1] + i, 0, 2);
    if (Op::kActivated && setup.epilogue.has_residual) __builtin_prefetch(in[2] + i, 0, 2);
  }
};

// The beginning of a line of each output, which a row leaves to be finished by the next.
template <typename scalar_t>
struct OpenLine {
  alignas(kLineBytes) scalar_t out[2][kLineElements<scalar_t>];
  std::int64_t filled = 0;  // elements
};

// Where Op's results of row r of a block go.
template <typename scalar_t, typename Op>
struct Outputs {
  scalar_t* out[2] = {};
  std::uint8_t* mask = nullptr;

  BNEXT_INLINE Outputs(const MapArgs& args, const Setup& setup, std::int64_t r) {
    if (setup.first) out[0] = static_cast<scalar_t*>(args.out[0]) + r * args.block.stride;
    if (setup.second) out[1] = static_cast<scalar_t*>(args.out[1]) + r * args.block.stride;
    if (setup.writes_mask) mask = args.block.mask + r * args.block.mask_stride;
  }

  // Asks for the cache line of element i, which need not be the row's, to be written.
  BNEXT_INLINE void reserve(const Setup& setup, std::int64_t i) const {
    if (setup.first) __builtin_prefetch(out[0] + i, 1, 3);
    if (setup.second) __builtin_prefetch(out[1] + i, 1, 3);
  }

  // How many elements of this row come before its first whole line.
  BNEXT_INLINE std::int64_t before_lines(const Setup& setup) const {
    return before_line(setup.first ? out[0] : out[1]);
  }

  // Whether lines can be streamed, of this row and of others `stride` apart: outputs must agree on where they begin,
  // and a mask's bits stand for elements counted from a row's beginning.
  BNEXT_INLINE bool can_stream(const Setup& setup, std::int64_t stride) const {
    const bool agree = !setup.second || before_lines(setup) == before_line(out[1]);
    const bool has_mask = setup.writes_mask || setup.epilogue.has_mask;
    return agree && (!has_mask || (before_lines(setup) == 0 && stride % kLineElements<scalar_t> == 0));
  }

  // The results of the elements from i on into an open line instead.
  BNEXT_INLINE Outputs into(OpenLine<scalar_t>& line, const Setup& setup, std::int64_t i) const {
    Outputs to = *this;
    if (setup.first) to.out[0] = line.out[0] + (line.filled - i);
    if (setup.second) to.out[1] = line.out[1] + (line.filled - i);
    return to;
  }

  // Streams a line that is full, and ends before element i.
  BNEXT_INLINE void close(OpenLine<scalar_t>& line, const Setup& setup, std::int64_t i) const {
    if (setup.first) stream_line(out[0] + i - kLineElements<scalar_t>, line.out[0]);
    if (setup.second) stream_line(out[1] + i - kLineElements<scalar_t>, line.out[1]);
    line.filled = 0;
  }

  template <typename acc_t, typename Lanes>
  BNEXT_INLINE void store(const Mapped<Vec<acc_t>>& mapped, const Setup& setup, std::int64_t i, Lanes lanes) const {
    if (setup.first) store_vector<acc_t>(out[0] + i, mapped.first, lanes);
    if (setup.second) store_vector<acc_t>(out[1] + i, mapped.second, lanes);
    if (setup.writes_mask) store_mask<kWidth<acc_t>>(mask, i, open_bits(mapped.second), lanes);
  }

  // A line's worth, perhaps past the caches.
  template <typename acc_t, bool kStream>
  BNEXT_INLINE void store_line_of(const Mapped<Vec<acc_t>> (&mapped)[kLineVectors<acc_t, scalar_t>], const Setup& setup,
                                  std::int64_t i) const {
    constexpr int kVectors = kLineVectors<acc_t, scalar_t>;
    const auto put = [](scalar_t* to, const Vec<acc_t>(&line)[kVectors]) {
      if constexpr (kStream) {
        alignas(kLineBytes) scalar_t packed[kLineElements<scalar_t>];
        store_line<acc_t>(packed, line);
        stream_line(to, packed);
      } else {
        store_line<acc_t>(to, line);
      }
    };
    Vec<acc_t> line[kVectors];
    if (setup.first) {
      for (int u = 0; u < kVectors; ++u) line[u] = mapped[u].first;
      put(out[0] + i, line);
    }
    if (setup.second) {
      for (int u = 0; u < kVectors; ++u) line[u] = mapped[u].second;
      put(out[1] + i, line);
    }
    if (setup.writes_mask) {
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
