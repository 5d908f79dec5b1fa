// Vector registers of compute type; loads, stores and conversions between them and elements in memory.
//
// Included by block_io.inl once for each instruction set, inside that set's namespace and under its target pragma:
// hence no include guard and no #include. kVectorBytes is the width of a register. The compiler's own vector
// types are used at exactly that width (wider ones are split badly), with ordinary operators.

template <typename T, int kN>
struct VectorOf {
  typedef T Type __attribute__((vector_size(sizeof(T) * kN)));
};
template <typename T, int kN>
using Vector = typename VectorOf<T, kN>::Type;

template <typename acc_t>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(acc_t));

template <typename V, typename T>
BNEXT_INLINE V load_raw(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <typename V, typename T>
BNEXT_INLINE void store_raw(T* to, const V& v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// The lanes of a register that an access covers: all of them or, at the end of a row, the first n. Lanes that are not
// loaded are zero.
struct Whole {};
struct Tail {
  int n;
};

BNEXT_INLINE std::uint32_t lane_bits(Tail tail) { return (1u << tail.n) - 1u; }

// Copies the first tail.n elements into a buffer of kN, whose others become zero; and back.
template <int kN, typename T>
BNEXT_INLINE void load_tail(T (&to)[kN], const T* from, Tail tail) {
  [[maybe_unused]] constexpr int kBytes = kN * static_cast<int>(sizeof(T));
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 64) {
    [[maybe_unused]] const std::uint32_t lanes = lane_bits(tail);
    if constexpr (sizeof(T) == 8) return store_raw(to, _mm512_maskz_loadu_epi64(lanes, from));
    if constexpr (sizeof(T) == 4 && kBytes == 64) return store_raw(to, _mm512_maskz_loadu_epi32(lanes, from));
    if constexpr (sizeof(T) == 4 && kBytes == 32) return store_raw(to, _mm256_maskz_loadu_epi32(lanes, from));
    if constexpr (sizeof(T) == 2 && kBytes == 32) return store_raw(to, _mm256_maskz_loadu_epi16(lanes, from));
    if constexpr (sizeof(T) == 2 && kBytes == 16) return store_raw(to, _mm_maskz_loadu_epi16(lanes, from));
  }
#endif
  for (int l = 0; l < kN; ++l) to[l] = l < tail.n ? from[l] : T{};
}

template <int kN, typename T>
BNEXT_INLINE void store_tail(T* to, const T (&from)[kN], Tail tail) {
  [[maybe_unused]] constexpr int kBytes = kN * static_cast<int>(sizeof(T));
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 64) {
    [[maybe_unused]] const std::uint32_t lanes = lane_bits(tail);
    if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_epi64(to, lanes, load_raw<__m512i>(from));
    if constexpr (sizeof(T) == 4 && kBytes == 64) return _mm512_mask_storeu_epi32(to, lanes, load_raw<__m512i>(from));
    if constexpr (sizeof(T) == 4 && kBytes == 32) return _mm256_mask_storeu_epi32(to, lanes, load_raw<__m256i>(from));
    if constexpr (sizeof(T) == 2 && kBytes == 32) return _mm256_mask_storeu_epi16(to, lanes, load_raw<__m256i>(from));
    if constexpr (sizeof(T) == 2 && kBytes == 16) return _mm_mask_storeu_epi16(to, lanes, load_raw<__m128i>(from));
  }
#endif
  for (int l = 0; l < tail.n; ++l) to[l] = from[l];
}

// The 512-bit intrinsics below are taken with a mask of all lanes: GCC 12 warns of an uninitialised value inside those
// without one.
constexpr unsigned short kAllLanes = 0xffff;

// 16-bit patterns to and from the lower halves of 32-bit lanes. (GCC 12 compiles __builtin_convertvector to several
// shuffles for 256 and 512 bits, where there is one instruction.)
template <int kN>
BNEXT_INLINE Vector<std::uint32_t, kN> load_bits(const void* from) {
  Vector<std::uint16_t, kN> bits;
  __builtin_memcpy(&bits, from, sizeof bits);
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 64 && kN == 16) {
    return __builtin_bit_cast(Vector<std::uint32_t, kN>,
                              _mm512_maskz_cvtepu16_epi32(kAllLanes, __builtin_bit_cast(__m256i, bits)));
  }
  if constexpr (kVectorBytes == 32 && kN == 8) {
    return __builtin_bit_cast(Vector<std::uint32_t, kN>, _mm256_cvtepu16_epi32(__builtin_bit_cast(__m128i, bits)));
  }
#endif
  return __builtin_convertvector(bits, Vector<std::uint32_t, kN>);
}

template <int kN>
BNEXT_INLINE void store_bits(void* to, const Vector<std::uint32_t, kN>& v) {
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 64 && kN == 16) {
    const __m256i bits = _mm512_maskz_cvtepi32_epi16(kAllLanes, __builtin_bit_cast(__m512i, v));
    __builtin_memcpy(to, &bits, sizeof bits);
    return;
  }
#endif
  const auto bits = __builtin_convertvector(v, Vector<std::uint16_t, kN>);
  __builtin_memcpy(to, &bits, sizeof bits);
}

// kN half-precision values to and from float32.
template <int kN>
BNEXT_INLINE Vector<float, kN> widen(const BFloat16* from) {
  return bfloat16_to_float<Vector<float, kN>>(load_bits<kN>(from));
}

#if defined(__x86_64__)
// Whether two registers of float32 are packed into one register of 16-bit elements, which is stored whole.
template <typename scalar_t>
constexpr bool kPacksPairs = std::is_same_v<scalar_t, BFloat16> || (sizeof(scalar_t) == 2 && kVectorBytes == 64);

// The results are in the lanes' upper halves. AVX-512 has a masked addition, which saves half of the instructions.
template <int kN>
BNEXT_INLINE Vector<std::uint32_t, kN> round_vector_to_bfloat16(const Vector<float, kN>& v) {
  using Bits = Vector<std::uint32_t, kN>;
  if constexpr (kN == 16) {
    const __m512i bits = __builtin_bit_cast(__m512i, v);
    const __m512 value = __builtin_bit_cast(__m512, v);
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i down = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_mask_add_epi32(down, odd, bits, _mm512_set1_epi32(0x8000));
    return __builtin_bit_cast(Bits, _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000)));
  } else {
    return round_to_bfloat16<Bits>(v);
  }
}

// (The arithmetic shift leaves signed 16-bit numbers, which the saturating pack does not change.)
template <int kN>
BNEXT_INLINE void narrow_pair(BFloat16* to, const Vector<float, kN>& low, const Vector<float, kN>& high) {
  const auto a = round_vector_to_bfloat16<kN>(low);
  const auto b = round_vector_to_bfloat16<kN>(high);
  if constexpr (kN == 16) {
    Vector<std::uint16_t, 2 * kN> upper_halves;
    for (int i = 0; i < 2 * kN; ++i) upper_halves[i] = static_cast<std::uint16_t>(2 * i + 1);
    store_raw(to, _mm512_permutex2var_epi16(__builtin_bit_cast(__m512i, a), __builtin_bit_cast(__m512i, upper_halves),
                                            __builtin_bit_cast(__m512i, b)));
  } else if constexpr (kN == 8) {
    const __m256i halves = _mm256_packs_epi32(_mm256_srai_epi32(__builtin_bit_cast(__m256i, a), 16),
                                              _mm256_srai_epi32(__builtin_bit_cast(__m256i, b), 16));
    store_raw(to, _mm256_permute4x64_epi64(halves, 0xd8));
  } else {
    store_raw(to, _mm_packs_epi32(_mm_srai_epi32(__builtin_bit_cast(__m128i, a), 16),
                                  _mm_srai_epi32(__builtin_bit_cast(__m128i, b), 16)));
  }
}
#endif

template <int kN>
BNEXT_INLINE void narrow(BFloat16* to, const Vector<float, kN>& v) {
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 32 && kN == 8) {
    const __m256i rounded = __builtin_bit_cast(__m256i, round_vector_to_bfloat16<kN>(v));
    const __m256i bits = _mm256_srai_epi32(rounded, 16);
    return store_raw(to, _mm_packs_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
  }
  if constexpr (kVectorBytes == 16 && kN == 4) {
    const __m128i bits = _mm_srai_epi32(__builtin_bit_cast(__m128i, round_vector_to_bfloat16<kN>(v)), 16);
    return _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi32(bits, bits));
  }
#endif
  store_bits<kN>(to, float_to_bfloat16<Vector<std::uint32_t, kN>>(v));
}

// Uses the processor's own conversions where this instruction set has them. (A target pragma does not define
// __F16C__ in time for the preprocessor, so the register's width stands for the instruction set.)
template <int kN>
BNEXT_INLINE Vector<float, kN> widen(const Half* from) {
  [[maybe_unused]] const auto bits = load_raw<Vector<std::uint16_t, kN>>(from);
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 64 && kN == 16) {
    return __builtin_bit_cast(Vector<float, kN>, _mm512_maskz_cvtph_ps(kAllLanes, __builtin_bit_cast(__m256i, bits)));
  }
  if constexpr (kVectorBytes >= 32 && kN == 8) {
    return __builtin_bit_cast(Vector<float, kN>, _mm256_cvtph_ps(__builtin_bit_cast(__m128i, bits)));
  }
#endif
  return float16_to_float<Vector<float, kN>>(load_bits<kN>(from));
}

template <int kN>
BNEXT_INLINE void narrow(Half* to, const Vector<float, kN>& v) {
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 64 && kN == 16) {
    return store_raw(to, _mm512_maskz_cvtps_ph(kAllLanes, __builtin_bit_cast(__m512, v), _MM_FROUND_TO_NEAREST_INT));
  }
  if constexpr (kVectorBytes >= 32 && kN == 8) {
    return store_raw(to, _mm256_cvtps_ph(__builtin_bit_cast(__m256, v), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  store_bits<kN>(to, float_to_float16<Vector<std::uint32_t, kN>>(v));
}

#if defined(__x86_64__)
// One store for both: a 64-byte load from two 32-byte stores cannot be forwarded, and waits for both.
template <int kN>
BNEXT_INLINE void narrow_pair(Half* to, const Vector<float, kN>& low, const Vector<float, kN>& high) {
  const __m256i a = _mm512_maskz_cvtps_ph(kAllLanes, __builtin_bit_cast(__m512, low), _MM_FROUND_TO_NEAREST_INT);
  const __m256i b = _mm512_maskz_cvtps_ph(kAllLanes, __builtin_bit_cast(__m512, high), _MM_FROUND_TO_NEAREST_INT);
  store_raw(to, __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

template <int kN>
BNEXT_INLINE Vector<float, kN> widen(const float* from) {
  return load_raw<Vector<float, kN>>(from);
}

// (GCC 12 compiles __builtin_convertvector to two conversions of half a register each, and joins their results.)
template <int kN>
BNEXT_INLINE Vector<double, kN> to_double(const Vector<float, kN>& v) {
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 64 && kN == 8) {
    return __builtin_bit_cast(Vector<double, kN>, _mm512_maskz_cvtps_pd(0xff, __builtin_bit_cast(__m256, v)));
  }
#endif
  return __builtin_convertvector(v, Vector<double, kN>);
}

// The sum of the lanes: one half is added to the other until two lanes are left.
template <int kN>
BNEXT_INLINE double sum_of_lanes(const Vector<double, kN>& v) {
  if constexpr (kN == 2) {
    return v[0] + v[1];
  } else {
    Vector<double, kN / 2> half[2];
    static_assert(sizeof half == sizeof v);
    __builtin_memcpy(half, &v, sizeof v);
    return sum_of_lanes<kN / 2>(half[0] + half[1]);
  }
}

template <int kN>
BNEXT_INLINE void narrow(float* to, const Vector<float, kN>& v) {
  store_raw(to, v);
}

// One register of compute type from kWidth<acc_t> elements, and back.
template <typename acc_t, typename scalar_t>
BNEXT_INLINE Vector<acc_t, kWidth<acc_t>> load_vector(const scalar_t* from, Whole = {}) {
  constexpr int kN = kWidth<acc_t>;
  if constexpr (sizeof(scalar_t) == sizeof(double)) {
    return load_raw<Vector<double, kN>>(from);
  } else if constexpr (sizeof(acc_t) == sizeof(double)) {
    return to_double<kN>(widen<kN>(from));
  } else {
    return widen<kN>(from);
  }
}

template <typename acc_t, typename scalar_t>
BNEXT_INLINE Vector<acc_t, kWidth<acc_t>> load_vector(const scalar_t* from, Tail tail) {
  scalar_t packed[kWidth<acc_t>];
  load_tail(packed, from, tail);
  return load_vector<acc_t>(packed);
}

// Loads two registers of elements, in the order that is cheapest: bfloat16 as the even elements and the odd ones, which
// take one shift and one mask.
template <typename acc_t, typename scalar_t>
BNEXT_INLINE void load_two_vectors(const scalar_t* from, Vector<acc_t, kWidth<acc_t>> (&v)[2]) {
  if constexpr (std::is_same_v<scalar_t, BFloat16> && std::is_same_v<acc_t, float>) {
    const auto bits = load_raw<Vector<std::uint32_t, kWidth<float>>>(from);
    v[0] = __builtin_bit_cast(Vector<float, kWidth<float>>, bits << 16);
    v[1] = __builtin_bit_cast(Vector<float, kWidth<float>>, bits & 0xffff0000u);
  } else {
    v[0] = load_vector<acc_t>(from);
    v[1] = load_vector<acc_t>(from + kWidth<acc_t>);
  }
}

template <typename acc_t, typename scalar_t>
BNEXT_INLINE void store_vector(scalar_t* to, const Vector<acc_t, kWidth<acc_t>>& v, Whole = {}) {
  constexpr int kN = kWidth<acc_t>;
  if constexpr (sizeof(scalar_t) == sizeof(double)) {
    store_raw(to, v);
  } else {
    narrow<kN>(to, __builtin_convertvector(v, Vector<float, kN>));
  }
}

template <typename acc_t, typename scalar_t>
BNEXT_INLINE void store_vector(scalar_t* to, const Vector<acc_t, kWidth<acc_t>>& v, Tail tail) {
  scalar_t packed[kWidth<acc_t>];
  store_vector<acc_t>(packed, v);
  store_tail(to, packed, tail);
}

template <typename acc_t>
BNEXT_INLINE Vector<acc_t, kWidth<acc_t>> broadcast(acc_t value) {
  return Vector<acc_t, kWidth<acc_t>>{} + value;
}

// v in the lanes of `tail`, 0 in the others.
template <typename acc_t>
BNEXT_INLINE Vector<acc_t, kWidth<acc_t>> keep(const Vector<acc_t, kWidth<acc_t>>& v, Tail tail) {
  using V = Vector<acc_t, kWidth<acc_t>>;
  using Bits = typename LanesOf<V>::Bits;
  Bits lane;
  for (int l = 0; l < kWidth<acc_t>; ++l) lane[l] = l;
  return lane < Bits{} + tail.n ? v : V{};
}

// A cache line in vector registers.
template <typename acc_t, typename scalar_t>
constexpr int kLineVectors = kLineBytes / (kWidth<acc_t> * static_cast<int>(sizeof(scalar_t)));

template <typename acc_t, typename scalar_t>
BNEXT_INLINE void store_line(scalar_t* to, const Vector<acc_t, kWidth<acc_t>> (&v)[kLineVectors<acc_t, scalar_t>]) {
#if defined(__x86_64__)
  if constexpr (kPacksPairs<scalar_t> && std::is_same_v<acc_t, float>) {
    constexpr int kN = kWidth<acc_t>;
#pragma GCC unroll 4
    for (int u = 0; u < kLineVectors<acc_t, scalar_t>; u += 2) narrow_pair<kN>(to + u * kN, v[u], v[u + 1]);
    return;
  }
#endif
#pragma GCC unroll 4
  for (int u = 0; u < kLineVectors<acc_t, scalar_t>; ++u) store_vector<acc_t>(to + u * kWidth<acc_t>, v[u]);
}

template <typename scalar_t>
constexpr int kLineElements = kLineBytes / static_cast<int>(sizeof(scalar_t));

// Stores a line past the caches, which would not hold the output. A line that is written in parts would be read first.
template <typename scalar_t>
BNEXT_INLINE void store_line_non_temporal(scalar_t* to, const scalar_t (&packed)[kLineElements<scalar_t>]) {
  constexpr int kStep = kVectorBytes / static_cast<int>(sizeof(scalar_t));
#pragma GCC unroll 4
  for (int i = 0; i < kLineElements<scalar_t>; i += kStep) {
#if defined(__x86_64__)
    if constexpr (kVectorBytes == 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), load_raw<__m512i>(packed + i));
    } else if constexpr (kVectorBytes == 32) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), load_raw<__m256i>(packed + i));
    } else {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), load_raw<__m128i>(packed + i));
    }
#else
    __builtin_memcpy(to + i, packed + i, kVectorBytes);
#endif
  }
}

// Non-temporal stores are weakly ordered: other threads may see them after later stores, unless a fence lies between.
BNEXT_INLINE void non_temporal_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}
