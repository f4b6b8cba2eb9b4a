// Entropy decoding (ITU-T T.81, F.2.2) and inverse DCT of baseline blocks. Part of
// image_kernels-inl.hpp.
#pragma once

#include <cstring>

#include "entropy.hpp"
#include "lanes.hpp"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace matryoshka {
namespace {

// ---- bits ----

// The next 64 bits of a segment, refilled without a branch (Giesen, "Reading bits in far too many
// ways"). The data is unstuffed, so that no byte needs a test for 0xFF.
struct BitReader {
  const uint8_t *next, *begin;
  uint64_t bits;  // the next bit is the highest one
  int count;      // valid bits

  inline void refill() {  // to at least 56 bits
    uint64_t word;
    std::memcpy(&word, next, sizeof word);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    bits |= word >> count;
    next += (63 - count) >> 3;
    count |= 56;
  }
  inline uint32_t peek(int n) const { return static_cast<uint32_t>(bits >> (64 - n)); }
  inline void drop(int n) {
    bits <<= n;
    count -= n;
  }
  inline int64_t bits_used() const { return (next - begin) * 8 - count; }
};

// ---- symbols ----

constexpr uint32_t kBadCode = 256;  // as a run

struct Symbol {
  uint32_t run;
  int32_t value;
};

// DECODE (T.81, figure F.16), RECEIVE (figure F.17) and EXTEND (figure F.12) for a code and value
// longer than kLookupBits. The run is kBadCode for damage and kEndOfBlock for EOB.
[[gnu::noinline]] Symbol decode_slow_path(BitReader& in, const HuffmanTable& table, uint32_t entry,
                                          bool dc) {
  in.refill();
  int length = entry & 31;
  int size = static_cast<int>(entry >> 16);
  uint32_t run = entry >> 8 & 255;
  if (length == 0) {  // the code alone is longer than kLookupBits
    const int32_t code = static_cast<int32_t>(in.peek(16));
    length = kLookupBits + 1;
    while (code >= table.code_end[length]) ++length;
    if (length > 16) return {kBadCode, 0};
    const int32_t index = table.value_offset[length] + (code >> (16 - length));
    const uint8_t symbol = table.huffval[index & 255];
    size = symbol & 15;
    run = dc ? 0 : symbol >> 4;
    if (size == 0 && !dc && run != 15) run = kEndOfBlock;
  }
  in.drop(length);
  if (size == 0) return {run, 0};
  const uint32_t bits = in.peek(size);
  in.drop(size);
  return {run, extend(bits, size)};
}

// The caller's reader stays in registers because only a copy has its address taken.
inline Symbol decode_slowly(BitReader& in, const HuffmanTable& table, uint32_t entry, bool dc) {
  BitReader copy = in;
  const Symbol symbol = decode_slow_path(copy, table, entry, dc);
  in = copy;
  return symbol;
}

// ---- blocks ----

// The place of coefficient k of the zigzag order (T.81, figure A.6) in a block; beyond the 64th, a
// place that the inverse DCT does not read.
struct NaturalOrder {
  uint8_t at[kZigzagSize];
  constexpr NaturalOrder() : at() {
    int k = 0;
    for (int diagonal = 0; diagonal < 15; ++diagonal) {
      for (int i = 0; i <= diagonal; ++i) {
        const int row = diagonal % 2 ? i : diagonal - i;
        const int column = diagonal - row;
        if (row < 8 && column < 8) at[k++] = static_cast<uint8_t>(8 * row + column);
      }
    }
    for (; k < kZigzagSize; ++k) at[k] = 64;
  }
};
constexpr NaturalOrder kNaturalOrder;

// T.81, F.2.2.1: the difference to the last DC coefficient. False for damage.
inline bool decode_dc(BitReader& in, const HuffmanTable& table, int32_t* difference) {
  in.refill();
  const uint32_t entry = table.lookup[in.peek(kLookupBits)];
  if (__builtin_expect(entry & kSlowFlag, 0)) {
    const Symbol symbol = decode_slowly(in, table, entry, true);
    *difference = symbol.value;
    return symbol.run == 0;
  }
  *difference = static_cast<int32_t>(entry) >> 16;
  in.drop(entry & 31);
  return true;
}

enum BlockKind { kDamaged, kDcOnly, kFull };

// T.81, F.2.2.2, figure F.13: the 63 AC coefficients, dequantised, into zeros.
inline BlockKind decode_ac(BitReader& in, const HuffmanTable& table, const uint16_t* quant_table,
                           int16_t* block) {
  const uint32_t* const lookup = table.lookup;
  uint32_t k = 1;
  uint32_t at = 0;
  while (k < 64) {
    in.refill();
    // 56 bits are enough for five look-ups of 10 bits.
    for (int i = 0; i < 5 && k < 64; ++i) {
      const uint32_t entry = lookup[in.peek(kLookupBits)];
      uint32_t run = entry >> 8 & 255;
      int32_t value = static_cast<int32_t>(entry) >> 16;
      if (__builtin_expect(entry & kSlowFlag, 0)) {
        const Symbol symbol = decode_slowly(in, table, entry, false);
        if (symbol.run == kBadCode) return kDamaged;
        run = symbol.run;
        value = symbol.value;
        i = 5;  // refill: the slow path used an unknown number of bits
      } else {
        in.drop(entry & 31);
      }
      at = k + run;
      block[kNaturalOrder.at[at]] = static_cast<int16_t>(value * quant_table[at]);
      k = at + 1;
    }
  }
  if (at > 63 && at <= kEndOfBlock) return kDamaged;  // a run beyond the block
  return at == kEndOfBlock + 1 ? kDcOnly : kFull;     // EOB was the first symbol
}

// Skip the 63 AC coefficients. False for damage.
inline bool skip_ac(BitReader& in, const HuffmanTable& table) {
  uint32_t k = 1;
  for (;;) {
    in.refill();
    for (int i = 0; i < 4; ++i) {  // 4 x 12 bits
      const uint32_t entry = table.skip[in.peek(kSkipBits)];
      const uint32_t coefficients = entry >> 4 & 127;
      // An entry may cover codes of the next block: the last coefficients are read one by one.
      if (__builtin_expect((entry & 15) == 0 || k + coefficients > 63, 0)) {
        const uint32_t single = table.lookup[in.peek(kLookupBits)];
        uint32_t run = single >> 8 & 255;
        if (single & kSlowFlag) {
          run = decode_slowly(in, table, single, false).run;
          if (run == kBadCode) return false;
          i = 4;  // refill
        } else {
          in.drop(single & 31);
        }
        k += run + 1;
        if (k >= 64) return k == 64 || k > kEndOfBlock;  // else: a run beyond the block
        continue;
      }
      in.drop(entry & 15);
      k += coefficients;
      if (entry >> 11) return true;
    }
  }
}

// Read one block; with kDecode, dequantised into 65 zeros. A skipped block is kDcOnly.
template <bool kDecode>
inline BlockKind read_block(BitReader& reader, DecodeJob::Component& c, int16_t* block) {
  BitReader in = reader;  // stays in registers
  int32_t difference;
  if (!decode_dc(in, *c.dc, &difference)) return kDamaged;
  c.dc_pred += difference;
  // libjpeg keeps the low 16 bits, and refuses a sum beyond 32 bits.
  if (c.dc_pred != static_cast<int16_t>(c.dc_pred)) return kDamaged;
  if (kDecode) block[0] = static_cast<int16_t>(c.dc_pred * c.quant_table[0]);
  BlockKind kind;
  if (kDecode) {
    kind = decode_ac(in, *c.ac, c.quant_table, block);
  } else {
    kind = skip_ac(in, *c.ac) ? kDcOnly : kDamaged;
  }
  reader = in;
  return kind;
}

// ---- inverse DCT ----

// The accurate integer method of libjpeg's jidctint.c (Loeffler, Ligtenberg, Moschytz 1989), with
// its names and its rounding: constants are FIX(x) = round(x * 2^13); pass 1 keeps two extra bits.
constexpr int kConstBits = 13;
constexpr int kPass1Bits = 2;
constexpr int kFix0_298631336 = 2446;
constexpr int kFix0_390180644 = 3196;
constexpr int kFix0_541196100 = 4433;
constexpr int kFix0_765366865 = 6270;
constexpr int kFix0_899976223 = 7373;
constexpr int kFix1_175875602 = 9633;
constexpr int kFix1_501321110 = 12299;
constexpr int kFix1_847759065 = 15137;
constexpr int kFix1_961570560 = 16069;
constexpr int kFix2_053119869 = 16819;
constexpr int kFix2_562915447 = 20995;
constexpr int kFix3_072711026 = 25172;

inline uint8_t clamp_to_byte(int value) {
  if (value < 0) return 0;
  return static_cast<uint8_t>(value > 255 ? 255 : value);
}

#if defined(__SSE2__)

// Two 16-bit factors in every lane, for pmaddwd.
inline __m128i pair(int a, int b) {
  const uint32_t low = static_cast<uint32_t>(a) & 0xFFFF;
  const uint32_t high = static_cast<uint32_t>(b) << 16;
  return _mm_set1_epi32(static_cast<int>(high | low));
}

// Eight 32-bit numbers.
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
// x * a + y * b of interleaved x, y and pair(a, b).
inline Wide multiply_add(Wide xy, __m128i ab) {
  return {_mm_madd_epi16(xy.low, ab), _mm_madd_epi16(xy.high, ab)};
}
template <int kShift>
inline __m128i narrow(Wide x) {
  return _mm_packs_epi32(_mm_srai_epi32(x.low, kShift), _mm_srai_epi32(x.high, kShift));
}

// One pass over eight columns. Sums of products share factors as in jidctint.c's comments: z1 to z5
// are folded into the constants.
template <int kShift>
inline void idct_pass(__m128i* v) {
  const __m128i rounding = _mm_set1_epi32(1 << (kShift - 1));
  const Wide round{rounding, rounding};

  // Even part.
  const Wide v26 = interleave(v[2], v[6]);
  // The sums wrap around where damaged data overflows, as in libjpeg's vector code.
  const Wide v04 = interleave(_mm_add_epi16(v[0], v[4]), _mm_sub_epi16(v[0], v[4]));
  const Wide even0 = multiply_add(v04, pair(1 << kConstBits, 0)) + round;
  const Wide even1 = multiply_add(v04, pair(0, 1 << kConstBits)) + round;
  const Wide even2 = multiply_add(v26, pair(kFix0_541196100, kFix0_541196100 - kFix1_847759065));
  const Wide even3 = multiply_add(v26, pair(kFix0_541196100 + kFix0_765366865, kFix0_541196100));
  const Wide a0 = even0 + even3;
  const Wide a3 = even0 - even3;
  const Wide a1 = even1 + even2;
  const Wide a2 = even1 - even2;

  // Odd part.
  const Wide z34 = interleave(_mm_add_epi16(v[7], v[3]), _mm_add_epi16(v[5], v[1]));
  const Wide z3 = multiply_add(z34, pair(kFix1_175875602 - kFix1_961570560, kFix1_175875602));
  const Wide z4 = multiply_add(z34, pair(kFix1_175875602, kFix1_175875602 - kFix0_390180644));
  const Wide v71 = interleave(v[7], v[1]);
  const Wide v53 = interleave(v[5], v[3]);
  const Wide b0 = multiply_add(v71, pair(kFix0_298631336 - kFix0_899976223, -kFix0_899976223)) + z3;
  const Wide b3 = multiply_add(v71, pair(-kFix0_899976223, kFix1_501321110 - kFix0_899976223)) + z4;
  const Wide b1 = multiply_add(v53, pair(kFix2_053119869 - kFix2_562915447, -kFix2_562915447)) + z4;
  const Wide b2 = multiply_add(v53, pair(-kFix2_562915447, kFix3_072711026 - kFix2_562915447)) + z3;

  v[0] = narrow<kShift>(a0 + b3);
  v[7] = narrow<kShift>(a0 - b3);
  v[1] = narrow<kShift>(a1 + b2);
  v[6] = narrow<kShift>(a1 - b2);
  v[2] = narrow<kShift>(a2 + b1);
  v[5] = narrow<kShift>(a2 - b1);
  v[3] = narrow<kShift>(a3 + b0);
  v[4] = narrow<kShift>(a3 - b0);
}

// One of the three steps of an 8 x 8 transpose.
inline void interleave_halves(__m128i* to, const __m128i* from) {
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = _mm_unpacklo_epi16(from[i], from[i + 4]);
    to[2 * i + 1] = _mm_unpackhi_epi16(from[i], from[i + 4]);
  }
}

inline void inverse_dct(const int16_t* block, uint8_t* out, size_t stride) {
  __m128i v[8], w[8];
  for (int i = 0; i < 8; ++i) v[i] = _mm_load_si128(reinterpret_cast<const __m128i*>(block) + i);
  idct_pass<kConstBits - kPass1Bits>(v);
  interleave_halves(w, v);
  interleave_halves(v, w);
  interleave_halves(w, v);
  idct_pass<kConstBits + kPass1Bits + 3>(w);

  // Saturate to signed bytes and transpose columns into rows, two rows in a register.
  const __m128i c01 = _mm_packs_epi16(w[0], w[1]), c23 = _mm_packs_epi16(w[2], w[3]);
  const __m128i c45 = _mm_packs_epi16(w[4], w[5]), c67 = _mm_packs_epi16(w[6], w[7]);
  const __m128i c04 = _mm_unpacklo_epi8(c01, c45), c15 = _mm_unpackhi_epi8(c01, c45);
  const __m128i c26 = _mm_unpacklo_epi8(c23, c67), c37 = _mm_unpackhi_epi8(c23, c67);
  const __m128i even0 = _mm_unpacklo_epi8(c04, c26), even1 = _mm_unpackhi_epi8(c04, c26);
  const __m128i odd0 = _mm_unpacklo_epi8(c15, c37), odd1 = _mm_unpackhi_epi8(c15, c37);
  const __m128i rows[4] = {_mm_unpacklo_epi8(even0, odd0), _mm_unpackhi_epi8(even0, odd0),
                           _mm_unpacklo_epi8(even1, odd1), _mm_unpackhi_epi8(even1, odd1)};

  // Flipping the sign bit adds 128 (T.81, A.3.1: level shift).
  const __m128i sign = _mm_set1_epi8(-128);
  for (int i = 0; i < 4; ++i, out += 2 * stride) {
    const __m128i two_rows = _mm_xor_si128(rows[i], sign);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), two_rows);
    _mm_storeh_pd(reinterpret_cast<double*>(out + stride), _mm_castsi128_pd(two_rows));
  }
}

#else

// One pass over eight columns; `out` is transposed. Unsigned arithmetic wraps around where damaged
// data would overflow.
template <int kShift, class T>
inline void idct_pass(const T* in, int32_t* out) {
  for (int i = 0; i < 8; ++i) {
    uint32_t v[8];
    for (int k = 0; k < 8; ++k) v[k] = static_cast<uint32_t>(static_cast<int32_t>(in[8 * k + i]));
    const uint32_t round = 1u << (kShift - 1);

    // Even part.
    const uint32_t z1 = (v[2] + v[6]) * kFix0_541196100;
    const uint32_t even2 = z1 - v[6] * kFix1_847759065;
    const uint32_t even3 = z1 + v[2] * kFix0_765366865;
    const uint32_t even0 = ((v[0] + v[4]) << kConstBits) + round;
    const uint32_t even1 = ((v[0] - v[4]) << kConstBits) + round;
    const uint32_t a0 = even0 + even3;
    const uint32_t a3 = even0 - even3;
    const uint32_t a1 = even1 + even2;
    const uint32_t a2 = even1 - even2;

    // Odd part.
    const uint32_t z5 = (v[7] + v[3] + v[5] + v[1]) * kFix1_175875602;
    const uint32_t z3 = z5 - (v[7] + v[3]) * kFix1_961570560;
    const uint32_t z4 = z5 - (v[5] + v[1]) * kFix0_390180644;
    const uint32_t p = (v[7] + v[1]) * kFix0_899976223;
    const uint32_t q = (v[5] + v[3]) * kFix2_562915447;
    const uint32_t b0 = v[7] * kFix0_298631336 - p + z3;
    const uint32_t b1 = v[5] * kFix2_053119869 - q + z4;
    const uint32_t b2 = v[3] * kFix3_072711026 - q + z3;
    const uint32_t b3 = v[1] * kFix1_501321110 - p + z4;

    const uint32_t sums[8] = {a0 + b3, a1 + b2, a2 + b1, a3 + b0,
                              a3 - b0, a2 - b1, a1 - b2, a0 - b3};
    for (int k = 0; k < 8; ++k) out[8 * i + k] = static_cast<int32_t>(sums[k]) >> kShift;
  }
}

inline void inverse_dct(const int16_t* block, uint8_t* out, size_t stride) {
  int32_t columns[64], rows[64];
  idct_pass<kConstBits - kPass1Bits>(block, columns);
  idct_pass<kConstBits + kPass1Bits + 3>(columns, rows);
  for (int y = 0; y < 8; ++y) {
    for (int x = 0; x < 8; ++x) out[y * stride + x] = clamp_to_byte(rows[8 * y + x] + 128);
  }
}

#endif

// The inverse DCT of a block without AC coefficients: one grey level.
inline void fill_block(int16_t dc, uint8_t* out, size_t stride) {
  const uint8_t level = clamp_to_byte(((dc + 4) >> 3) + 128);
  for (int y = 0; y < 8; ++y) std::memset(out + y * stride, level, 8);
}

inline void clear_block(int16_t* block) {
  const Lanes zero = broadcast(0);
  for (int i = 0; i < 64; i += kLanes) store(reinterpret_cast<uint16_t*>(block) + i, zero);
}

// The bits of the first row's magnitudes. libjpeg's inverse DCT has a short cut for blocks without
// other coefficients, which overflows from kExtreme on. No encoder writes such numbers.
constexpr int kExtreme = 1 << 13;

// By column, so that the compiler makes four vector instructions of it.
inline void add_magnitudes(uint16_t* bits, const int16_t* block) {
  for (int k = 0; k < 8; ++k) bits[k] |= static_cast<uint16_t>(block[k] ^ block[k] >> 15);
}

// ---- segments ----

bool decode_blocks(DecodeJob& job) {
  BitReader in{job.data, job.data, 0, 0};
  const int64_t available = static_cast<int64_t>(job.size) * 8;
  alignas(32) int16_t block[72] = {};  // 64 coefficients and the place of those beyond
  for (int i = 0; i < job.components; ++i) job.component[i].dc_pred = 0;
  alignas(16) uint16_t magnitudes[8] = {};
  int row = static_cast<int>(job.first / job.mcus_per_row);
  int column = static_cast<int>(job.first % job.mcus_per_row);
  for (int64_t mcu = job.first; mcu < job.last; ++mcu) {
    bool in_box = job.left <= column && column < job.right && job.top <= row && row < job.bottom;
    if (in_box && job.wanted) in_box = job.wanted[job.box_place(row, column)];
    for (int i = 0; i < job.components; ++i) {
      DecodeJob::Component& c = job.component[i];
      for (int y = 0; y < c.v; ++y) {
        for (int x = 0; x < c.h; ++x) {
          const BlockKind kind =
              in_box ? read_block<true>(in, c, block) : read_block<false>(in, c, block);
          if (kind == kDamaged || in.bits_used() > available) return false;
          if (!in_box) continue;
          const size_t block_row = static_cast<size_t>(row - job.top) * c.v + y;
          const size_t block_column = static_cast<size_t>(column - job.left) * c.h + x;
          uint8_t* out = c.plane + 8 * block_row * c.stride + 8 * block_column;
          add_magnitudes(magnitudes, block);
          if (kind == kDcOnly) {
            fill_block(block[0], out, c.stride);
          } else {
            inverse_dct(block, out, c.stride);
            clear_block(block);
          }
        }
      }
    }
    if (++column == job.mcus_per_row) {
      column = 0;
      ++row;
    }
  }
  for (const uint16_t bits : magnitudes) {
    if (bits >= kExtreme) return false;
  }
  // Up to 7 bits pad the last byte (T.81, F.1.2.3); a whole byte left over is a lost block.
  return !job.complete || available - in.bits_used() < 8;
}

// Read the 63 AC coefficients code by code, without their values. False for damage.
inline bool pass_ac(BitReader& in, const HuffmanTable& table) {
  uint32_t k = 1;
  while (k < 64) {
    in.refill();
    for (int i = 0; i < 5 && k < 64; ++i) {  // as in decode_ac
      const uint32_t entry = table.lookup[in.peek(kLookupBits)];
      uint32_t run = entry >> 8 & 255;
      if (__builtin_expect(entry & kSlowFlag, 0)) {
        run = decode_slowly(in, table, entry, false).run;
        if (run == kBadCode) return false;
        i = 5;
      } else {
        in.drop(entry & 31);
      }
      k += run + 1;
    }
  }
  return k == 64 || k > kEndOfBlock;  // else: a run beyond the block
}

// 32 bits of `data`, from bit `at` on.
inline uint32_t load_bits(const uint8_t* data, int64_t at) {
  uint64_t word;
  std::memcpy(&word, data + (at >> 3), sizeof word);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  word = __builtin_bswap64(word);
#endif
  return static_cast<uint32_t>(word << (at & 7) >> 32);
}

inline bool equal_bits(const uint8_t* a, int64_t a_at, const uint8_t* b, int64_t b_at, int64_t n) {
  uint32_t different = 0;
  for (; n >= 32; n -= 32, a_at += 32, b_at += 32)
    different |= load_bits(a, a_at) ^ load_bits(b, b_at);
  if (n > 0) different |= (load_bits(a, a_at) ^ load_bits(b, b_at)) >> (32 - n);
  return different == 0;
}

inline BitReader reader_at(const uint8_t* data, int64_t bit) {
  BitReader in{data + (bit >> 3), data, 0, 0};
  in.refill();
  in.drop(static_cast<int>(bit & 7));
  return in;
}

// Read the DC coefficient of the next block. False for damage.
inline bool next_dc(BitReader& in, CompareJob::Side& side, int component) {
  int32_t difference;
  if (!decode_dc(in, *side.dc[component], &difference)) return false;
  int32_t& dc = side.dc_pred[component];
  dc += difference;
  return dc == static_cast<int16_t>(dc);
}

// The first side is read code by code. Where the AC codes are the same, equal bits are equal
// coefficients.
bool equal_blocks(CompareJob& job) {
  CompareJob::Side& a = job.side[0];
  CompareJob::Side& b = job.side[1];
  const int64_t available_a = static_cast<int64_t>(a.size) * 8;
  const int64_t available_b = static_cast<int64_t>(b.size) * 8;
  BitReader in_a = reader_at(a.data, a.place);
  int64_t place_b = b.place;
  for (int64_t mcu = job.first; mcu < job.last; ++mcu) {
    for (int i = 0; i < job.components; ++i) {
      for (int k = 0; k < job.blocks[i]; ++k) {
        BitReader in = in_a;  // stays in registers
        BitReader in_b = reader_at(b.data, place_b);
        if (!next_dc(in, a, i) || !next_dc(in_b, b, i)) return false;
        if (a.dc_pred[i] != b.dc_pred[i]) return false;
        const int64_t ac_a = in.bits_used();
        const int64_t ac_b = in_b.bits_used();
        if (!pass_ac(in, *job.ac[i])) return false;
        const int64_t length = in.bits_used() - ac_a;
        place_b = ac_b + length;
        if (in.bits_used() > available_a || place_b > available_b) return false;
        if (!equal_bits(a.data, ac_a, b.data, ac_b, length)) return false;
        in_a = in;
      }
    }
  }
  a.place = in_a.bits_used();
  b.place = place_b;
  // See decode_blocks.
  return !(a.complete && available_a - a.place >= 8) && !(b.complete && available_b - b.place >= 8);
}

}  // namespace
}  // namespace matryoshka
