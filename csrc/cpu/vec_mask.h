// The bits of a mask, or of valid elements, and the lanes of a register that they stand for.
//
// Included by block_io.inl after vec.h, likewise once for each instruction set.

// 1 in the lanes whose bit is set, 0 in the others. One bit a lane, the lowest first.
template <typename V>
BNEXT_INLINE V from_bits(std::uint32_t bits) {
  using T = scalar_of<V>;
  using Bits = typename LanesOf<V>::Bits;
  Bits each;
  for (int l = 0; l < kWidth<T>; ++l) each[l] = 1 << l;
  const Bits named = each & static_cast<std::remove_reference_t<decltype(each[0])>>(bits);
  return named != 0 ? V{} + static_cast<T>(1) : V{};
}

// The lanes of `named` where the bit is set, those of `others` elsewhere.
template <typename V>
BNEXT_INLINE V select(std::uint32_t bits, const V& named, const V& others) {
  using T = scalar_of<V>;
#if defined(__x86_64__)
  if constexpr (kVectorBytes == 64 && sizeof(T) == 4) {
    return __builtin_bit_cast(V, _mm512_mask_blend_ps(static_cast<__mmask16>(bits), __builtin_bit_cast(__m512, others),
                                                      __builtin_bit_cast(__m512, named)));
  }
  if constexpr (kVectorBytes == 64 && sizeof(T) == 8) {
    return __builtin_bit_cast(V, _mm512_mask_blend_pd(static_cast<__mmask8>(bits), __builtin_bit_cast(__m512d, others),
                                                      __builtin_bit_cast(__m512d, named)));
  }
#endif
  return from_bits<V>(bits) != static_cast<T>(0) ? named : others;
}

// A bit for each lane: whether it is above zero or a NaN, which means that the rectifier is open (opening()).
template <typename V>
BNEXT_INLINE std::uint32_t open_bits(const V& opening) {
  using T = scalar_of<V>;
  [[maybe_unused]] constexpr std::uint32_t kAll = (1u << kWidth<T>)-1u;
  const auto closed = opening <= static_cast<T>(0);
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

// The byte of a row's mask with the bit of element i, which is not negative: a signed division takes more instructions.
BNEXT_INLINE std::uint64_t mask_byte(std::int64_t i) {
  static_assert(kCpuMaskLanes == 8, "a bit an element");
  return static_cast<std::uint64_t>(i) / 8;
}

// The bits of elements i, i + 1, ... of a row's mask, i a multiple of a register's lanes kN.
template <int kN>
BNEXT_INLINE std::uint32_t load_mask(const std::uint8_t* mask, std::int64_t i, Whole = {}) {
  if constexpr (kN == 16) {
    std::uint16_t bits;
    __builtin_memcpy(&bits, mask + mask_byte(i), sizeof bits);
    return bits;
  } else if constexpr (kN == 8) {
    return mask[mask_byte(i)];
  } else {
    return mask[mask_byte(i)] >> (i % 8);
  }
}

// Reads no byte beyond the one with the tail's last bit: the row may end there.
template <int kN>
BNEXT_INLINE std::uint32_t load_mask(const std::uint8_t* mask, std::int64_t i, Tail tail) {
  if (kN == 16 && tail.n <= 8) return mask[mask_byte(i)];
  return load_mask<kN>(mask, i);
}

// A row must be written in order: where several registers share a byte, the first overwrites all of it.
template <int kN>
BNEXT_INLINE void store_mask(std::uint8_t* mask, std::int64_t i, std::uint32_t bits, Whole = {}) {
  std::uint8_t* to = mask + mask_byte(i);
  if constexpr (kN == 16) {
    const auto word = static_cast<std::uint16_t>(bits);
    __builtin_memcpy(to, &word, sizeof word);
  } else if constexpr (kN == 8) {
    *to = static_cast<std::uint8_t>(bits);
  } else {
    const std::uint32_t before = i % 8 == 0 ? 0u : *to;
    *to = static_cast<std::uint8_t>(before | bits << (i % 8));
  }
}

template <int kN>
BNEXT_INLINE void store_mask(std::uint8_t* mask, std::int64_t i, std::uint32_t bits, Tail tail) {
  const std::uint32_t named = bits & lane_bits(tail);
  if (kN == 16 && tail.n <= 8) {
    mask[mask_byte(i)] = static_cast<std::uint8_t>(named);
  } else {
    store_mask<kN>(mask, i, named);
  }
}
