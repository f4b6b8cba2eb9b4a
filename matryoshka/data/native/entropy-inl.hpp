// Entropy decoding and inverse DCT of baseline blocks. Part of image_kernels-inl.hpp.
#include <cstring>

#include "entropy.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace matryoshka {
namespace {

struct BitReader {
  const uint8_t *next, *begin;
  uint64_t bits;  // the first one on top
  int count;      // how many of them are surely there

  inline void refill() {  // to at least 56
    uint64_t word;
    std::memcpy(&word, next, sizeof word);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    bits |= word >> count;
    next += (63 - count) >> 3;
    count |= 56;
  }
  inline void take(int n) {
    bits <<= n;
    count -= n;
  }
  inline int64_t used() const { return (next - begin) * 8 - count; }
};

constexpr uint32_t kBadCode = 256;

struct Symbol {
  uint32_t run;
  int32_t value;
};

// A code that is long or whose value is; kBadCode or kEndOfBlock instead of a run where it is none.
[[gnu::noinline]] Symbol read_slowly(BitReader& in, const HuffmanTable& table, uint32_t entry,
                                     bool dc) {
  in.refill();
  int length = entry & 31, size = static_cast<int>(entry >> 16);
  uint32_t run = entry >> 8 & 255;
  if (length == 0) {
    const int32_t code = static_cast<int32_t>(in.bits >> 48);
    for (length = kFastBits + 1; code >= table.last_code[length]; ++length) {
    }
    if (length > 16) return {kBadCode, 0};
    const uint8_t symbol = table.symbols[(table.offset[length] + (code >> (16 - length))) & 255];
    size = symbol & 15;
    run = dc ? 0 : symbol >> 4;
    if (size == 0 && !dc && run != 15) run = kEndOfBlock;
  }
  in.take(length);
  if (size == 0) return {run, 0};
  const int32_t value = static_cast<int32_t>(in.bits >> (64 - size));
  in.take(size);
  return {run, value < (1 << (size - 1)) ? value - (1 << size) + 1 : value};
}

// Where coefficient k of the zigzag order stands; behind the 64th: a place that nobody reads.
struct NaturalOrder {
  uint8_t at[kZigzag];
  constexpr NaturalOrder() : at() {
    int k = 0;
    for (int sum = 0; sum < 15; ++sum)
      for (int i = 0; i <= sum; ++i) {
        const int row = sum % 2 ? i : sum - i, column = sum - row;
        if (row < 8 && column < 8) at[k++] = static_cast<uint8_t>(8 * row + column);
      }
    for (; k < kZigzag; ++k) at[k] = 64;
  }
};
constexpr NaturalOrder kNaturalOrder;

inline Symbol read_symbol_slowly(BitReader& in, const HuffmanTable& table, uint32_t entry,
                                 bool dc) {
  BitReader copy = in;  // a reader whose address nobody takes stays in registers
  const Symbol symbol = read_slowly(copy, table, entry, dc);
  in = copy;
  return symbol;
}

// The difference to the last block's mean. False for damage.
inline bool read_dc(BitReader& in, const HuffmanTable& table, int32_t* value) {
  in.refill();
  const uint32_t entry = table.fast[in.bits >> (64 - kFastBits)];
  if (__builtin_expect(entry & kSlow, 0)) {
    const Symbol symbol = read_symbol_slowly(in, table, entry, true);
    *value = symbol.value;
    return symbol.run == 0;
  }
  *value = static_cast<int32_t>(entry) >> 16;
  in.take(entry & 31);
  return true;
}

// The other 63 coefficients, dequantised. 0: damage, 1: all are zero, 2: not all.
inline int read_ac(BitReader& in, const HuffmanTable& table, const uint16_t* factors,
                   int16_t* block) {
  const uint32_t* const fast = table.fast;
  uint32_t k = 1, at = 0;
  while (k < 64) {
    in.refill();
    for (int i = 0; i < 5 && k < 64; ++i) {  // so many short codes are surely there
      const uint32_t entry = fast[in.bits >> (64 - kFastBits)];
      uint32_t run = entry >> 8 & 255;
      int32_t value = static_cast<int32_t>(entry) >> 16;
      if (__builtin_expect(entry & kSlow, 0)) {
        const Symbol symbol = read_symbol_slowly(in, table, entry, false);
        if (symbol.run == kBadCode) return 0;
        run = symbol.run, value = symbol.value;
        i = 5;
      } else {
        in.take(entry & 31);
      }
      at = k + run;
      block[kNaturalOrder.at[at]] = static_cast<int16_t>(value * factors[at]);
      k = at + 1;
    }
  }
  if (at > 63 && at <= kEndOfBlock) return 0;  // a run beyond the block
  return at == kEndOfBlock + 1 ? 1 : 2;
}

// Passes the other 63 coefficients. False for damage.
inline bool skip_ac(BitReader& in, const HuffmanTable& table) {
  uint32_t k = 1;
  for (;;) {
    in.refill();
    for (int i = 0; i < 4; ++i) {
      const uint32_t entry = table.skip[in.bits >> (64 - kSkipBits)], passed = entry >> 4 & 127;
      // Codes behind the 64th coefficient belong to the next block: those of the last ones are read
      // one by one.
      if (__builtin_expect((entry & 15) == 0 || k + passed > 63, 0)) {
        const uint32_t one = table.fast[in.bits >> (64 - kFastBits)];
        uint32_t run = one >> 8 & 255;
        if (one & kSlow) {
          run = read_symbol_slowly(in, table, one, false).run;
          if (run == kBadCode) return false;
          i = 4;
        } else {
          in.take(one & 31);
        }
        k += run + 1;
        if (k >= 64) return k == 64 || k > kEndOfBlock;  // else: a run beyond the block
        continue;
      }
      in.take(entry & 15);
      k += passed;
      if (entry >> 11) return true;
    }
  }
}

// Reads one block, dequantised, into 65 zeros. 0: damage, 1: nothing but the mean, 2: more.
template <bool kStore>
inline int read_block(BitReader& reader, BlockScan::Component& c, int16_t* block) {
  BitReader in = reader;
  int32_t difference;
  if (!read_dc(in, *c.dc, &difference)) return 0;
  c.prediction = static_cast<int16_t>(c.prediction + difference);
  if (kStore) block[0] = static_cast<int16_t>(c.prediction * c.factors[0]);
  const int kind = kStore ? read_ac(in, *c.ac, c.factors, block) : skip_ac(in, *c.ac);
  reader = in;
  return kind;
}

constexpr int kConstBits = 13, kPassBits = 2;

#if defined(__SSE2__)

inline __m128i pair(int a, int b) {
  return _mm_set1_epi32(
      static_cast<int>(static_cast<uint32_t>(b) << 16 | (static_cast<uint32_t>(a) & 0xFFFF)));
}

struct Wide {
  __m128i low, high;
};
inline Wide operator+(Wide x, Wide y) {
  return {_mm_add_epi32(x.low, y.low), _mm_add_epi32(x.high, y.high)};
}
inline Wide operator-(Wide x, Wide y) {
  return {_mm_sub_epi32(x.low, y.low), _mm_sub_epi32(x.high, y.high)};
}
inline Wide interleave(__m128i x, __m128i y) {
  return {_mm_unpacklo_epi16(x, y), _mm_unpackhi_epi16(x, y)};
}
inline Wide times(Wide x, __m128i constants) {
  return {_mm_madd_epi16(x.low, constants), _mm_madd_epi16(x.high, constants)};
}
template <int n>
inline __m128i narrow(Wide x) {
  return _mm_packs_epi32(_mm_srai_epi32(x.low, n), _mm_srai_epi32(x.high, n));
}

// One pass of jidctint.c (Loeffler, Ligtenberg, Moschytz) over eight columns.
template <int kShift>
inline void pass(__m128i* v) {
  const __m128i rounding = _mm_set1_epi32(1 << (kShift - 1));
  const Wide v26 = interleave(v[2], v[6]), v04 = interleave(v[0], v[4]);
  const Wide even3 = times(v26, pair(4433 + 6270, 4433)),
             even2 = times(v26, pair(4433, 4433 - 15137));
  const Wide round{rounding, rounding};
  const Wide even0 = times(v04, pair(8192, 8192)) + round,
             even1 = times(v04, pair(8192, -8192)) + round;
  const Wide a0 = even0 + even3, a3 = even0 - even3, a1 = even1 + even2, a2 = even1 - even2;

  const Wide z34 = interleave(_mm_add_epi16(v[7], v[3]), _mm_add_epi16(v[5], v[1]));
  const Wide z3 = times(z34, pair(9633 - 16069, 9633)), z4 = times(z34, pair(9633, 9633 - 3196));
  const Wide v71 = interleave(v[7], v[1]), v53 = interleave(v[5], v[3]);
  const Wide b0 = times(v71, pair(2446 - 7373, -7373)) + z3,
             b3 = times(v71, pair(-7373, 12299 - 7373)) + z4;
  const Wide b1 = times(v53, pair(16819 - 20995, -20995)) + z4,
             b2 = times(v53, pair(-20995, 25172 - 20995)) + z3;
  v[0] = narrow<kShift>(a0 + b3), v[7] = narrow<kShift>(a0 - b3);
  v[1] = narrow<kShift>(a1 + b2), v[6] = narrow<kShift>(a1 - b2);
  v[2] = narrow<kShift>(a2 + b1), v[5] = narrow<kShift>(a2 - b1);
  v[3] = narrow<kShift>(a3 + b0), v[4] = narrow<kShift>(a3 - b0);
}

inline void inverse_dct(const int16_t* block, uint8_t* out, size_t stride) {
  __m128i v[8], w[8];
  for (int i = 0; i < 8; ++i) v[i] = _mm_load_si128(reinterpret_cast<const __m128i*>(block) + i);
  pass<kConstBits - kPassBits>(v);
  for (int i = 0; i < 4; ++i)
    w[2 * i] = _mm_unpacklo_epi16(v[i], v[i + 4]),
          w[2 * i + 1] = _mm_unpackhi_epi16(v[i], v[i + 4]);
  for (int i = 0; i < 4; ++i)
    v[2 * i] = _mm_unpacklo_epi16(w[i], w[i + 4]),
          v[2 * i + 1] = _mm_unpackhi_epi16(w[i], w[i + 4]);
  for (int i = 0; i < 4; ++i)
    w[2 * i] = _mm_unpacklo_epi16(v[i], v[i + 4]),
          w[2 * i + 1] = _mm_unpackhi_epi16(v[i], v[i + 4]);
  pass<kConstBits + kPassBits + 3>(w);
  // Columns of signed bytes -> rows.
  const __m128i c01 = _mm_packs_epi16(w[0], w[1]), c23 = _mm_packs_epi16(w[2], w[3]);
  const __m128i c45 = _mm_packs_epi16(w[4], w[5]), c67 = _mm_packs_epi16(w[6], w[7]);
  const __m128i c04 = _mm_unpacklo_epi8(c01, c45), c15 = _mm_unpackhi_epi8(c01, c45);
  const __m128i c26 = _mm_unpacklo_epi8(c23, c67), c37 = _mm_unpackhi_epi8(c23, c67);
  const __m128i e0 = _mm_unpacklo_epi8(c04, c26), e1 = _mm_unpackhi_epi8(c04, c26);
  const __m128i o0 = _mm_unpacklo_epi8(c15, c37), o1 = _mm_unpackhi_epi8(c15, c37);
  const __m128i rows[4] = {_mm_unpacklo_epi8(e0, o0), _mm_unpackhi_epi8(e0, o0),
                           _mm_unpacklo_epi8(e1, o1), _mm_unpackhi_epi8(e1, o1)};
  const __m128i centre = _mm_set1_epi8(-128);
  for (int i = 0; i < 4; ++i, out += 2 * stride) {
    const __m128i two = _mm_xor_si128(rows[i], centre);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), two);
    _mm_storeh_pd(reinterpret_cast<double*>(out + stride), _mm_castsi128_pd(two));
  }
}

#else

template <int kShift, class T>
inline void pass(const T* in, int32_t* out) {  // out is turned
  for (int i = 0; i < 8; ++i) {
    const auto at = [&](int k) {
      return static_cast<uint32_t>(static_cast<int32_t>(in[8 * k + i]));
    };
    const uint32_t z1 = (at(2) + at(6)) * 4433u, even2 = z1 - at(6) * 15137u,
                   even3 = z1 + at(2) * 6270u;
    const uint32_t round = 1u << (kShift - 1);
    const uint32_t even0 = ((at(0) + at(4)) << kConstBits) + round,
                   even1 = ((at(0) - at(4)) << kConstBits) + round;
    const uint32_t z5 = (at(7) + at(3) + at(5) + at(1)) * 9633u;
    const uint32_t z3 = z5 - (at(7) + at(3)) * 16069u, z4 = z5 - (at(5) + at(1)) * 3196u;
    const uint32_t p = (at(7) + at(1)) * 7373u, q = (at(5) + at(3)) * 20995u;
    const uint32_t b0 = at(7) * 2446u - p + z3, b1 = at(5) * 16819u - q + z4;
    const uint32_t b2 = at(3) * 25172u - q + z3, b3 = at(1) * 12299u - p + z4;
    const uint32_t a0 = even0 + even3, a3 = even0 - even3, a1 = even1 + even2, a2 = even1 - even2;
    const uint32_t values[8] = {a0 + b3, a1 + b2, a2 + b1, a3 + b0,
                                a3 - b0, a2 - b1, a1 - b2, a0 - b3};
    for (int k = 0; k < 8; ++k) out[8 * i + k] = static_cast<int32_t>(values[k]) >> kShift;
  }
}

inline void inverse_dct(const int16_t* block, uint8_t* out, size_t stride) {
  int32_t columns[64], rows[64];
  pass<kConstBits - kPassBits>(block, columns);
  pass<kConstBits + kPassBits + 3>(columns, rows);
  for (int y = 0; y < 8; ++y)
    for (int x = 0; x < 8; ++x) {
      const int32_t value = rows[8 * y + x] + 128;
      out[y * stride + x] = static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
    }
}

#endif

inline void fill_block(int16_t mean, uint8_t* out, size_t stride) {
  const int value = ((mean + 4) >> 3) + 128;
  const uint8_t level = static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
  for (int y = 0; y < 8; ++y) std::memset(out + y * stride, level, 8);
}

bool decode_blocks(BlockScan& scan) {
  BitReader in{scan.data, scan.data, 0, 0};
  const int64_t available = static_cast<int64_t>(scan.size) * 8;
  alignas(32) int16_t block[72] = {};
  for (int i = 0; i < scan.components; ++i) scan.component[i].prediction = 0;
  int row = static_cast<int>(scan.first / scan.columns),
      column = static_cast<int>(scan.first % scan.columns);
  for (int64_t mcu = scan.first; mcu < scan.last; ++mcu) {
    const bool wanted =
        scan.left <= column && column < scan.right && scan.top <= row && row < scan.bottom;
    for (int i = 0; i < scan.components; ++i) {
      BlockScan::Component& c = scan.component[i];
      for (int y = 0; y < c.v; ++y) {
        for (int x = 0; x < c.h; ++x) {
          const int kind =
              wanted ? read_block<true>(in, c, block) : read_block<false>(in, c, block);
          if (kind == 0 || in.used() > available) return false;
          if (!wanted) continue;
          const size_t down = 8 * (static_cast<size_t>(row - scan.top) * c.v + y);
          uint8_t* out =
              c.plane + down * c.stride + 8 * (static_cast<size_t>(column - scan.left) * c.h + x);
          if (kind == 1) {
            fill_block(block[0], out, c.stride);
          } else {
            inverse_dct(block, out, c.stride);
            const Lanes zero = all(0);
            for (int i = 0; i < 64; i += kLanes)
              store(reinterpret_cast<uint16_t*>(block) + i, zero);
          }
        }
      }
    }
    if (++column == scan.columns) column = 0, ++row;
  }
  // Whole bytes left over are blocks that were lost.
  return !scan.complete || available - in.used() < 8;
}

}  // namespace
}  // namespace matryoshka
