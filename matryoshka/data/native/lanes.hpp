// Lanes: sixteen 16-bit numbers as one value. It is one AVX2 register, two SSE2 or NEON registers,
// or an array. Files that are compiled for different CPUs include this: everything has internal
// linkage.
//
// load_bytes_high    16 bytes as the upper halves of 16-bit numbers
// broadcast          one number in all lanes
// broadcast_pair     one number, from 32 bits that hold it twice, in all lanes
// mulhi              the upper 16 bits of the products, unsigned
// pack_saturated     signed 16-bit numbers as bytes, limited to 0 .. 255
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace matryoshka {
namespace {

constexpr int kLanes = 16;

#if defined(__AVX2__)

struct Lanes {
  __m256i v;
};
inline Lanes load(const uint16_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline void store(uint16_t* p, Lanes a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
inline Lanes load_bytes_high(const uint8_t* p) {
  return {_mm256_slli_epi16(
      _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 8)};
}
inline Lanes broadcast(uint16_t x) { return {_mm256_set1_epi16(static_cast<short>(x))}; }
inline Lanes broadcast_pair(const uint32_t* p) { return {_mm256_set1_epi32(static_cast<int>(*p))}; }
inline Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_epi16(a.v, b.v)}; }
inline Lanes operator-(Lanes a, Lanes b) { return {_mm256_sub_epi16(a.v, b.v)}; }
inline Lanes operator^(Lanes a, Lanes b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline Lanes mulhi(Lanes a, Lanes b) { return {_mm256_mulhi_epu16(a.v, b.v)}; }
inline Lanes mulhi_signed(Lanes a, Lanes b) { return {_mm256_mulhi_epi16(a.v, b.v)}; }
template <int n>
inline Lanes shift_right(Lanes a) {
  return {_mm256_srli_epi16(a.v, n)};
}
template <int n>
inline Lanes shift_right_signed(Lanes a) {
  return {_mm256_srai_epi16(a.v, n)};
}

using PackedBytes = __m128i;
inline PackedBytes pack_saturated(Lanes a) {
  return _mm_packus_epi16(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
}

#elif defined(__SSE2__)

struct Lanes {
  __m128i a, b;
};
inline __m128i load8(const uint16_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
inline Lanes load(const uint16_t* p) { return {load8(p), load8(p + 8)}; }
inline void store(uint16_t* p, Lanes x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), x.a);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), x.b);
}
inline Lanes load_bytes_high(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)),
                zero = _mm_setzero_si128();
  return {_mm_unpacklo_epi8(zero, x), _mm_unpackhi_epi8(zero, x)};
}
inline Lanes broadcast(uint16_t x) {
  const __m128i v = _mm_set1_epi16(static_cast<short>(x));
  return {v, v};
}
inline Lanes broadcast_pair(const uint32_t* p) {
  const __m128i v = _mm_set1_epi32(static_cast<int>(*p));
  return {v, v};
}
inline Lanes operator+(Lanes x, Lanes y) {
  return {_mm_add_epi16(x.a, y.a), _mm_add_epi16(x.b, y.b)};
}
inline Lanes operator-(Lanes x, Lanes y) {
  return {_mm_sub_epi16(x.a, y.a), _mm_sub_epi16(x.b, y.b)};
}
inline Lanes operator^(Lanes x, Lanes y) {
  return {_mm_xor_si128(x.a, y.a), _mm_xor_si128(x.b, y.b)};
}
inline Lanes mulhi(Lanes x, Lanes y) {
  return {_mm_mulhi_epu16(x.a, y.a), _mm_mulhi_epu16(x.b, y.b)};
}
inline Lanes mulhi_signed(Lanes x, Lanes y) {
  return {_mm_mulhi_epi16(x.a, y.a), _mm_mulhi_epi16(x.b, y.b)};
}
template <int n>
inline Lanes shift_right(Lanes x) {
  return {_mm_srli_epi16(x.a, n), _mm_srli_epi16(x.b, n)};
}
template <int n>
inline Lanes shift_right_signed(Lanes x) {
  return {_mm_srai_epi16(x.a, n), _mm_srai_epi16(x.b, n)};
}

using PackedBytes = __m128i;
inline PackedBytes pack_saturated(Lanes x) { return _mm_packus_epi16(x.a, x.b); }

#elif defined(__ARM_NEON)

struct Lanes {
  uint16x8_t a, b;
};
inline Lanes load(const uint16_t* p) { return {vld1q_u16(p), vld1q_u16(p + 8)}; }
inline void store(uint16_t* p, Lanes x) {
  vst1q_u16(p, x.a);
  vst1q_u16(p + 8, x.b);
}
inline Lanes load_bytes_high(const uint8_t* p) {
  return {vshll_n_u8(vld1_u8(p), 8), vshll_n_u8(vld1_u8(p + 8), 8)};
}
inline Lanes broadcast(uint16_t x) { return {vdupq_n_u16(x), vdupq_n_u16(x)}; }
inline Lanes broadcast_pair(const uint32_t* p) { return broadcast(static_cast<uint16_t>(*p)); }
inline Lanes operator+(Lanes x, Lanes y) { return {vaddq_u16(x.a, y.a), vaddq_u16(x.b, y.b)}; }
inline Lanes operator-(Lanes x, Lanes y) { return {vsubq_u16(x.a, y.a), vsubq_u16(x.b, y.b)}; }
inline Lanes operator^(Lanes x, Lanes y) { return {veorq_u16(x.a, y.a), veorq_u16(x.b, y.b)}; }
inline uint16x8_t mulhi8(uint16x8_t x, uint16x8_t y) {
  const uint32x4_t low = vmull_u16(vget_low_u16(x), vget_low_u16(y));
  const uint32x4_t high = vmull_u16(vget_high_u16(x), vget_high_u16(y));
  return vcombine_u16(vshrn_n_u32(low, 16), vshrn_n_u32(high, 16));
}
inline uint16x8_t mulhi8_signed(uint16x8_t x, uint16x8_t y) {
  const int16x8_t p = vreinterpretq_s16_u16(x), q = vreinterpretq_s16_u16(y);
  const int32x4_t low = vmull_s16(vget_low_s16(p), vget_low_s16(q));
  const int32x4_t high = vmull_s16(vget_high_s16(p), vget_high_s16(q));
  return vreinterpretq_u16_s16(vcombine_s16(vshrn_n_s32(low, 16), vshrn_n_s32(high, 16)));
}
inline Lanes mulhi(Lanes x, Lanes y) { return {mulhi8(x.a, y.a), mulhi8(x.b, y.b)}; }
inline Lanes mulhi_signed(Lanes x, Lanes y) {
  return {mulhi8_signed(x.a, y.a), mulhi8_signed(x.b, y.b)};
}
template <int n>
inline Lanes shift_right(Lanes x) {
  return {vshrq_n_u16(x.a, n), vshrq_n_u16(x.b, n)};
}
inline uint16x8_t signed8(int16x8_t x) { return vreinterpretq_u16_s16(x); }
template <int n>
inline Lanes shift_right_signed(Lanes x) {
  return {signed8(vshrq_n_s16(vreinterpretq_s16_u16(x.a), n)),
          signed8(vshrq_n_s16(vreinterpretq_s16_u16(x.b), n))};
}

using PackedBytes = uint8x16_t;
inline PackedBytes pack_saturated(Lanes x) {
  return vcombine_u8(vqmovun_s16(vreinterpretq_s16_u16(x.a)),
                     vqmovun_s16(vreinterpretq_s16_u16(x.b)));
}

#else

struct Lanes {
  uint16_t v[kLanes];
};
template <class F>
inline Lanes each(F f) {
  Lanes r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = static_cast<uint16_t>(f(i));
  return r;
}
inline int16_t as_signed(uint16_t x) { return static_cast<int16_t>(x); }
inline Lanes load(const uint16_t* p) {
  return each([&](int i) { return p[i]; });
}
inline void store(uint16_t* p, const Lanes& x) { std::memcpy(p, x.v, sizeof x.v); }
inline Lanes load_bytes_high(const uint8_t* p) {
  return each([&](int i) { return p[i] << 8; });
}
inline Lanes broadcast(uint16_t x) {
  return each([&](int) { return x; });
}
inline Lanes broadcast_pair(const uint32_t* p) { return broadcast(static_cast<uint16_t>(*p)); }
inline Lanes operator+(const Lanes& x, const Lanes& y) {
  return each([&](int i) { return x.v[i] + y.v[i]; });
}
inline Lanes operator-(const Lanes& x, const Lanes& y) {
  return each([&](int i) { return x.v[i] - y.v[i]; });
}
inline Lanes operator^(const Lanes& x, const Lanes& y) {
  return each([&](int i) { return x.v[i] ^ y.v[i]; });
}
inline Lanes mulhi(const Lanes& x, const Lanes& y) {
  return each([&](int i) { return (uint32_t{x.v[i]} * y.v[i]) >> 16; });
}
inline Lanes mulhi_signed(const Lanes& x, const Lanes& y) {
  return each([&](int i) { return (as_signed(x.v[i]) * as_signed(y.v[i])) >> 16; });
}
template <int n>
inline Lanes shift_right(const Lanes& x) {
  return each([&](int i) { return x.v[i] >> n; });
}
template <int n>
inline Lanes shift_right_signed(const Lanes& x) {
  return each([&](int i) { return as_signed(x.v[i]) >> n; });
}

struct PackedBytes {
  uint8_t v[kLanes];
};
inline PackedBytes pack_saturated(const Lanes& x) {
  PackedBytes r;
  for (int i = 0; i < kLanes; ++i) {
    const int value = as_signed(x.v[i]);
    const int limited = value > 255 ? 255 : value;
    r.v[i] = static_cast<uint8_t>(limited < 0 ? 0 : limited);
  }
  return r;
}

#endif

// Transpose 16 rows of 8 numbers, `stride` apart, into 8 columns of 16.
inline void transpose_16x8(uint16_t* columns, const uint16_t* rows, size_t stride) {
#if defined(__AVX2__)
  __m256i r[8], s[8];
  for (int i = 0; i < 8; ++i) {
    const __m128i top = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + i * stride));
    const __m128i bottom =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + (i + 8) * stride));
    r[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(top), bottom, 1);
  }
  for (int i = 0; i < 4; ++i) {
    s[2 * i] = _mm256_unpacklo_epi16(r[i], r[i + 4]);
    s[2 * i + 1] = _mm256_unpackhi_epi16(r[i], r[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    r[2 * i] = _mm256_unpacklo_epi16(s[i], s[i + 4]);
    r[2 * i + 1] = _mm256_unpackhi_epi16(s[i], s[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    store(columns + 32 * i, {_mm256_unpacklo_epi16(r[i], r[i + 4])});
    store(columns + 32 * i + 16, {_mm256_unpackhi_epi16(r[i], r[i + 4])});
  }
#elif defined(__SSE2__)
  for (int half = 0; half < 2; ++half, rows += 8 * stride, columns += 8) {
    __m128i r[8], s[8];
    for (int i = 0; i < 8; ++i) r[i] = load8(rows + i * stride);
    for (int i = 0; i < 4; ++i) {
      s[2 * i] = _mm_unpacklo_epi16(r[i], r[i + 4]);
      s[2 * i + 1] = _mm_unpackhi_epi16(r[i], r[i + 4]);
    }
    for (int i = 0; i < 4; ++i) {
      r[2 * i] = _mm_unpacklo_epi16(s[i], s[i + 4]);
      r[2 * i + 1] = _mm_unpackhi_epi16(s[i], s[i + 4]);
    }
    for (int i = 0; i < 4; ++i) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(columns + 32 * i),
                       _mm_unpacklo_epi16(r[i], r[i + 4]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(columns + 32 * i + 16),
                       _mm_unpackhi_epi16(r[i], r[i + 4]));
    }
  }
#else
  for (int c = 0; c < 8; ++c)
    for (int i = 0; i < kLanes; ++i) columns[c * kLanes + i] = rows[i * stride + c];
#endif
}

// Transpose 8 columns of 16 bytes and write them to 16 rows, at offset `at`.
inline void store_transposed(uint8_t* const* rows, size_t at, const PackedBytes* columns) {
#if defined(__SSE2__)
  __m128i a[4], b[4], c[8];
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm_unpacklo_epi8(columns[i], columns[i + 4]);
    b[i] = _mm_unpackhi_epi8(columns[i], columns[i + 4]);
  }
  // c: rows 0-3, 4-7, 8-11, 12-15 of the even columns, then of the odd ones
  for (int i = 0; i < 2; ++i) {
    c[4 * i] = _mm_unpacklo_epi8(a[i], a[i + 2]);
    c[4 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 2]);
    c[4 * i + 2] = _mm_unpacklo_epi8(b[i], b[i + 2]);
    c[4 * i + 3] = _mm_unpackhi_epi8(b[i], b[i + 2]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m128i first = _mm_unpacklo_epi8(c[i], c[i + 4]),
                  second = _mm_unpackhi_epi8(c[i], c[i + 4]);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(rows[4 * i] + at), first);
    _mm_storeh_pd(reinterpret_cast<double*>(rows[4 * i + 1] + at), _mm_castsi128_pd(first));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(rows[4 * i + 2] + at), second);
    _mm_storeh_pd(reinterpret_cast<double*>(rows[4 * i + 3] + at), _mm_castsi128_pd(second));
  }
#else
  uint8_t bytes[8][kLanes];
  for (int c = 0; c < 8; ++c) std::memcpy(bytes[c], &columns[c], kLanes);
  for (int i = 0; i < kLanes; ++i)
    for (int c = 0; c < 8; ++c) rows[i][at + c] = bytes[c][i];
#endif
}

}  // namespace
}  // namespace matryoshka
