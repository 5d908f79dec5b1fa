// Compile-time specialisations: common combinations of an activation and flags are compiled with these as constants, so
// that the inner loops hold no branches; the instance for all others reads them from the call.
#pragma once

// Whether elements are computed in their opmath_t, as nearly all are: that path is worth the code of non-temporal
// stores and unrolled loops.
template <typename scalar_t, typename acc_t>
constexpr bool kIsOpmath = std::is_same_v<acc_t, opmath_t<scalar_t>>;

// What an activated functor is to do, and which of its optional inputs and outputs the call has.
struct Flags {
  Epilogue epilogue;
  bool input = true;  // a call with a mask may have none
  bool first = true;
  bool second = false;
  bool writes_mask = false;
  bool has_padding = false;
};

// An activation, and flags in the bits above it; kAny: known at run time only. A plain functor is specialised by
// nothing but whether there is padding (kPlain, kPadding).
using Specialization = unsigned;
constexpr Specialization first_flag_above(Specialization values) {
  Specialization flag = 1;
  while (flag < values) flag *= 2;
  return flag;
}
constexpr Specialization kResidual = first_flag_above(kActCount);
static_assert(kActCount <= kResidual, "an activation must not be taken for a flag");
constexpr Specialization kMask = 2 * kResidual;
constexpr Specialization kSecond = 2 * kMask;
constexpr Specialization kStatistics = 2 * kSecond;
constexpr Specialization kPadding = 2 * kStatistics;
constexpr Specialization kIncomplete = 2 * kPadding;
constexpr Specialization kAny = ~0u;
constexpr Specialization kPlain = static_cast<Specialization>(Act::kIdentity);
constexpr Specialization kRelu = static_cast<Specialization>(Act::kRelu);
constexpr Specialization kRelu6 = static_cast<Specialization>(Act::kRelu6);
constexpr Specialization kSilu = static_cast<Specialization>(Act::kSilu);
constexpr Specialization kGelu = static_cast<Specialization>(Act::kGelu);
constexpr Specialization kHardswish = static_cast<Specialization>(Act::kHardswish);

template <typename Op>
BNEXT_INLINE constexpr Flags flags_of(Specialization specialization) {
  Flags flags;
  flags.epilogue.activation.act = static_cast<Act>(specialization % kResidual);
  flags.epilogue.has_residual = (specialization & kResidual) != 0;
  flags.epilogue.has_mask = Op::kReadsGrad && (specialization & kMask) != 0;
  flags.epilogue.differentiates_statistics = (specialization & kStatistics) != 0;
  flags.second = (specialization & kSecond) != 0;
  flags.writes_mask = !Op::kReadsGrad && (specialization & kMask) != 0;
  flags.has_padding = (specialization & kPadding) != 0;
  return flags;
}

template <typename Op>
BNEXT_INLINE Flags flags_of(const ReduceArgs& args) {
  Flags flags;
  flags.has_padding = args.block.valid != nullptr;
  if constexpr (Op::kActivated) {
    flags.epilogue = args.epilogue;
    flags.epilogue.differentiates_statistics = false;  // sums do not depend on it
    flags.input = args.block.in[0] != nullptr;
  }
  return flags;
}

template <typename Op>
BNEXT_INLINE Flags flags_of(const MapArgs& args) {
  Flags flags;
  flags.has_padding = args.block.valid != nullptr;
  if constexpr (Op::kActivated) {
    flags.epilogue = args.epilogue;
    flags.input = args.block.in[0] != nullptr;
    flags.first = args.out[0] != nullptr;
    flags.second = args.out[1] != nullptr;
    flags.writes_mask = !Op::kReadsGrad && args.block.mask != nullptr;
  }
  return flags;
}

template <typename Op, Specialization kSpecialization, typename Args>
BNEXT_INLINE Flags known_flags(const Args& args) {
  if constexpr (kSpecialization == kAny) {
    return flags_of<Op>(args);
  } else {
    return flags_of<Op>(kSpecialization);
  }
}

// The specialisation for these flags; one that does not exist if an input or output is missing that all others use.
BNEXT_INLINE Specialization specialization_of(const Flags& flags) {
  const Epilogue& epilogue = flags.epilogue;
  Specialization specialization = static_cast<Specialization>(epilogue.activation.act);
  specialization |= epilogue.has_residual ? kResidual : 0;
  specialization |= epilogue.has_mask || flags.writes_mask ? kMask : 0;
  specialization |= flags.second ? kSecond : 0;
  specialization |= epilogue.differentiates_statistics ? kStatistics : 0;
  specialization |= flags.has_padding ? kPadding : 0;
  return flags.input && flags.first ? specialization : specialization | kIncomplete;
}

template <typename Op>
constexpr Specialization kSpecializations[] = {kAny};
template <>
inline constexpr Specialization kSpecializations<ActivatedNormalize>[] = {
    kRelu, kRelu | kResidual, kRelu | kMask, kRelu | kResidual | kMask, kRelu6, kSilu, kGelu, kHardswish};
template <>
inline constexpr Specialization kSpecializations<ActivatedGradSums>[] = {kRelu, kRelu | kMask, kRelu6,
                                                                         kSilu, kGelu,         kHardswish};
template <>
inline constexpr Specialization kSpecializations<ActivatedGrad>[] = {
    kRelu | kStatistics,  kRelu | kStatistics | kMask | kSecond,
    kRelu6 | kStatistics, kSilu | kStatistics,
    kGelu | kStatistics,  kHardswish | kStatistics};

template <typename Kernel, typename scalar_t, typename acc_t, typename Op, int kIndex, typename Args>
BNEXT_INLINE void run_first_match(const Args& args, Specialization specialization) {
  if constexpr (kIndex < static_cast<int>(sizeof kSpecializations<Op> / sizeof(Specialization))) {
    constexpr Specialization kSpecialization = kSpecializations<Op>[kIndex];
    if (specialization == kSpecialization) return Kernel::template run<scalar_t, acc_t, Op, kSpecialization>(args);
    run_first_match<Kernel, scalar_t, acc_t, Op, kIndex + 1>(args, specialization);
  } else {
    Kernel::template run<scalar_t, acc_t, Op, kAny>(args);
  }
}

// Runs the kernel in the specialisation of this call. Kernel: a struct whose run() is the kernel.
template <typename Kernel, typename scalar_t, typename acc_t, typename Op, typename Args>
void run_specialized(const Args& args) {
  if constexpr (Op::kActivated && sizeof(acc_t) == sizeof(float)) {
    run_first_match<Kernel, scalar_t, acc_t, Op, 0>(args, specialization_of(flags_of<Op>(args)));
  } else if constexpr (!Op::kActivated && kIsOpmath<scalar_t, acc_t>) {
    if (args.block.valid == nullptr) {
      Kernel::template run<scalar_t, acc_t, Op, kPlain>(args);
    } else {
      Kernel::template run<scalar_t, acc_t, Op, kPadding>(args);
    }
  } else {
    Kernel::template run<scalar_t, acc_t, Op, kAny>(args);
  }
}

// Whether to unroll loops: only on the path that nearly all data takes. The other instances are most of the code, and
// without unrolling they compile in a fraction of the time. Do not use it where unrolling changes the order of a sum: a
// gradient's bits must not depend on which other gradients are asked for, and so not on the specialisation.
template <typename scalar_t, typename acc_t, typename Op, Specialization kSpecialization>
constexpr bool kCommon = kIsOpmath<scalar_t, acc_t> && kSpecialization != kAny;
