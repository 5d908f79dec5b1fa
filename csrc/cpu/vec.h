// A register's worth of compute type, and how elements get into and out of it.
//
// Included by rows.inl once for each instruction set, inside that set's namespace and under its target pragma:
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

// The 512-bit forms below are taken with a mask of all lanes: GCC 12 warns of an uninitialised value inside those
// without one.
constexpr unsigned short kAllLanes = 0xffff;

// 16-bit patterns to and from the lower halves of 32-bit lanes. (Of __builtin_convertvector GCC 12 makes several
// shuffles for 512 bits, where there is one instruction.)
template <int kN>
BNEXT_INLINE Vector<std::uint32_t, kN> load_bits(const void* from) {
  Vector<std::uint16_t, kN> bits;
  __builtin_memcpy(&bits, from, sizeof bits);
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 64 && kN == 16) {
    return __builtin_bit_cast(Vector<std::uint32_t, kN>,
                              _mm512_maskz_cvtepu16_epi32(kAllLanes, __builtin_bit_cast(__m256i, bits)));
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

template <int kN>
BNEXT_INLINE void narrow(BFloat16* to, const Vector<float, kN>& v) {
  store_bits<kN>(to, float_to_bfloat16<Vector<std::uint32_t, kN>>(v));
}

// By the processor's own instructions where this instruction set has them. (A target pragma does not define
// __F16C__ in time for the preprocessor, so the register's width stands for the instruction set.)
template <int kN>
BNEXT_INLINE Vector<float, kN> widen(const Half* from) {
  const auto bits = load_raw<Vector<std::uint16_t, kN>>(from);
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

template <int kN>
BNEXT_INLINE Vector<float, kN> widen(const float* from) {
  return load_raw<Vector<float, kN>>(from);
}

template <int kN>
BNEXT_INLINE void narrow(float* to, const Vector<float, kN>& v) {
  store_raw(to, v);
}

// One register of compute type from kWidth<acc_t> elements, and back.
template <typename acc_t, typename scalar_t>
BNEXT_INLINE Vector<acc_t, kWidth<acc_t>> load_vector(const scalar_t* from) {
  constexpr int kN = kWidth<acc_t>;
  if constexpr (sizeof(scalar_t) == sizeof(double)) {
    return load_raw<Vector<double, kN>>(from);
  } else {
    return __builtin_convertvector(widen<kN>(from), Vector<acc_t, kN>);
  }
}

template <typename acc_t, typename scalar_t>
BNEXT_INLINE void store_vector(scalar_t* to, const Vector<acc_t, kWidth<acc_t>>& v) {
  constexpr int kN = kWidth<acc_t>;
  if constexpr (sizeof(scalar_t) == sizeof(double)) {
    store_raw(to, v);
  } else {
    narrow<kN>(to, __builtin_convertvector(v, Vector<float, kN>));
  }
}

template <typename acc_t>
BNEXT_INLINE Vector<acc_t, kWidth<acc_t>> broadcast(acc_t value) {
  return Vector<acc_t, kWidth<acc_t>>{} + value;
}

// The same for one element, where a row's end leaves less than a register.
template <typename acc_t, typename scalar_t>
BNEXT_INLINE acc_t load_scalar(const scalar_t* from) {
  if constexpr (sizeof(scalar_t) == 2) {
    return static_cast<acc_t>(to_float(*from));
  } else {
    return static_cast<acc_t>(*from);
  }
}
template <typename acc_t>
BNEXT_INLINE void store_scalar(float* to, acc_t value) {
  *to = static_cast<float>(value);
}
template <typename acc_t>
BNEXT_INLINE void store_scalar(double* to, acc_t value) {
  *to = static_cast<double>(value);
}
template <typename acc_t>
BNEXT_INLINE void store_scalar(Half* to, acc_t value) {
  *to = to_half(static_cast<float>(value));
}
template <typename acc_t>
BNEXT_INLINE void store_scalar(BFloat16* to, acc_t value) {
  *to = to_bfloat16(static_cast<float>(value));
}

// V is acc_t, for one element, or a register of them.
template <typename V, typename acc_t, typename scalar_t>
BNEXT_INLINE V load_as(const scalar_t* from) {
  if constexpr (sizeof(V) == sizeof(acc_t)) {
    return load_scalar<acc_t>(from);
  } else {
    return load_vector<acc_t>(from);
  }
}

template <typename V, typename acc_t, typename scalar_t>
BNEXT_INLINE void store_as(scalar_t* to, const V& value) {
  if constexpr (sizeof(V) == sizeof(acc_t)) {
    store_scalar<acc_t>(to, value);
  } else {
    store_vector<acc_t>(to, value);
  }
}

// store_vector past the caches: for outputs that they would not hold. `to` is aligned to what is stored.
template <typename acc_t, typename scalar_t>
BNEXT_INLINE void stream_vector(scalar_t* to, const Vector<acc_t, kWidth<acc_t>>& v) {
  constexpr int kBytes = kWidth<acc_t> * static_cast<int>(sizeof(scalar_t));
  alignas(kBytes) scalar_t packed[kWidth<acc_t>];
  store_vector<acc_t>(packed, v);
#if defined(__x86_64__)
  if constexpr (kBytes == 64 && kVectorBytes == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), load_raw<__m512i>(packed));
    return;
  }
  if constexpr (kBytes == 32 && kVectorBytes >= 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), load_raw<__m256i>(packed));
    return;
  }
  if constexpr (kBytes == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), load_raw<__m128i>(packed));
    return;
  }
#endif
  __builtin_memcpy(to, packed, sizeof packed);
}

// Streamed stores are seen by other threads in no order, unless told to wait.
BNEXT_INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Which lanes of V a mask's bits name: 1 in those, 0 in the others. One bit a lane, the lowest first.
template <typename V>
BNEXT_INLINE V from_bits(std::uint32_t bits) {
  using T = scalar_of<V>;
  if constexpr (std::is_same_v<V, T>) {
    return static_cast<T>(bits & 1u);
  } else {
    using Bits = typename LanesOf<V>::Bits;
    Bits each;
    for (int l = 0; l < kWidth<T>; ++l) each[l] = 1 << l;
    const Bits named = each & static_cast<std::remove_reference_t<decltype(each[0])>>(bits);
    return named != 0 ? V{} + static_cast<T>(1) : V{};
  }
}

// Whether each lane is above zero or a NaN: what a rectifier lets through.
template <typename V>
BNEXT_INLINE std::uint32_t open_bits(const V& z) {
  using T = scalar_of<V>;
  if constexpr (std::is_same_v<V, T>) {
    return z <= static_cast<T>(0) ? 0u : 1u;
  } else {
    constexpr std::uint32_t kAll = (1u << kWidth<T>)-1u;
    const auto closed = z <= static_cast<T>(0);
#if defined(__x86_64__)
    if constexpr (kVectorBytes == 64 && sizeof(T) == 4)
      return _mm512_movepi32_mask(__builtin_bit_cast(__m512i, closed)) ^ kAll;
    if constexpr (kVectorBytes == 64 && sizeof(T) == 8)
      return _mm512_movepi64_mask(__builtin_bit_cast(__m512i, closed)) ^ kAll;
    if constexpr (kVectorBytes == 32 && sizeof(T) == 4)
      return static_cast<unsigned>(_mm256_movemask_ps(__builtin_bit_cast(__m256, closed))) ^ kAll;
    if constexpr (kVectorBytes == 32 && sizeof(T) == 8)
      return static_cast<unsigned>(_mm256_movemask_pd(__builtin_bit_cast(__m256d, closed))) ^ kAll;
#endif
    std::uint32_t bits = 0;
    for (int l = 0; l < kWidth<T>; ++l) bits |= (closed[l] == 0 ? 1u : 0u) << l;
    return bits;
  }
}

// The bits of elements i, i + 1, ... of a row's mask, i a multiple of their number kN.
template <int kN>
BNEXT_INLINE std::uint32_t load_mask(const std::uint8_t* mask, std::int64_t i) {
  if constexpr (kN == 16) {
    std::uint16_t bits;
    __builtin_memcpy(&bits, mask + i / 8, sizeof bits);
    return bits;
  } else {
    return mask[i / 8] >> (i % 8);
  }
}

// A row is written from its first element to its last.
template <int kN>
BNEXT_INLINE void store_mask(std::uint8_t* mask, std::int64_t i, std::uint32_t bits) {
  if constexpr (kN == 16) {
    const auto word = static_cast<std::uint16_t>(bits);
    __builtin_memcpy(mask + i / 8, &word, sizeof word);
  } else {
    const std::uint32_t before = i % 8 == 0 ? 0u : mask[i / 8];
    mask[i / 8] = static_cast<std::uint8_t>(before | bits << (i % 8));
  }
}
