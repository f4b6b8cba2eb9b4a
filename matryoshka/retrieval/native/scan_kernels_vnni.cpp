// For x86-64 with AVX-512 F, BW, VL, VNNI and VPOPCNTDQ.
#include "scan_kernels.hpp"

#include <immintrin.h>

#include <cstring>

namespace matryoshka::search {
namespace {

// The rows `first` + lanes of mask whose scores are in a register.
inline void keep(__m512i scores, unsigned mask, size_t first, size_t end, Found& found) {
  alignas(64) int32_t stored[16];
  _mm512_store_si512(stored, scores);
  for (; mask; mask &= mask - 1) {
    const auto lane = static_cast<size_t>(__builtin_ctz(mask));
    found.add(stored[lane], first + lane, end);
  }
}

// Scores of 64 rows and kCount queries stay in registers: a line of codes is loaded once for all
// queries, which is 2 to 3 times as fast as a query after the other where lines come from the
// second-level cache.
template <size_t kCount, size_t kChunks>
size_t scan_codes_of(const uint8_t* codes, size_t first, size_t end, size_t chunks,
                     const int8_t* const* queries, Found* const* found) {
  if (kChunks) chunks = kChunks;
  const size_t group = chunks * kGroup * kChunk;  // bytes
  for (; first < end && has_room(found, kCount); first += kBlock) {
    const uint8_t* at = codes + first * chunks * kChunk;
    __m512i sums[kCount][4];
    for (auto& sum : sums)
      for (auto& four : sum) four = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (size_t c = 0; c < chunks; ++c, at += kGroup * kChunk) {
      __m512i line[4];
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i) line[i] = _mm512_loadu_si512(at + i * group);
#pragma GCC unroll 4
      for (size_t q = 0; q < kCount; ++q) {
        int32_t four;
        std::memcpy(&four, queries[q] + c * kChunk, 4);
        const __m512i spread = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; ++i)
          sums[q][i] = _mm512_dpbusd_epi32(sums[q][i], line[i], spread);
      }
    }
#pragma GCC unroll 4
    for (size_t q = 0; q < kCount; ++q) {
      const __m512i threshold = _mm512_set1_epi32(found[q]->threshold);
      const __m512i best = _mm512_max_epi32(_mm512_max_epi32(sums[q][0], sums[q][1]),
                                            _mm512_max_epi32(sums[q][2], sums[q][3]));
      if (!_mm512_cmpgt_epi32_mask(best, threshold)) continue;
      for (size_t i = 0; i < 4; ++i) {
        const unsigned mask = _mm512_cmpgt_epi32_mask(sums[q][i], threshold);
        if (mask) keep(sums[q][i], mask, first + 16 * i, end, *found[q]);
      }
    }
  }
  return first;
}

template <size_t kCount>
size_t scan_codes_by(const uint8_t* codes, size_t first, size_t end, size_t chunks,
                     const int8_t* const* queries, Found* const* found) {
  switch (chunks) {  // 8, 16, 32 and 64 dimensions
    case 2: return scan_codes_of<kCount, 2>(codes, first, end, chunks, queries, found);
    case 4: return scan_codes_of<kCount, 4>(codes, first, end, chunks, queries, found);
    case 8: return scan_codes_of<kCount, 8>(codes, first, end, chunks, queries, found);
    case 16: return scan_codes_of<kCount, 16>(codes, first, end, chunks, queries, found);
    default: return scan_codes_of<kCount, 0>(codes, first, end, chunks, queries, found);
  }
}

size_t scan_codes(const uint8_t* codes, size_t first, size_t end, size_t chunks,
                  const int8_t* const* queries, size_t count, Found* const* found) {
  switch (count) {
    case 1: return scan_codes_by<1>(codes, first, end, chunks, queries, found);
    case 2: return scan_codes_by<2>(codes, first, end, chunks, queries, found);
    case 3: return scan_codes_by<3>(codes, first, end, chunks, queries, found);
    default: return scan_codes_by<4>(codes, first, end, chunks, queries, found);
  }
}

// Counts are 64 bits wide; those of two groups share a register, so that 64 rows are 4 registers.
template <size_t kWords>
size_t scan_bits_of(const uint64_t* bits, size_t first, size_t end, size_t words,
                    const uint64_t* const* queries, size_t count, Found* const* found) {
  if (kWords) words = kWords;
  for (; first < end && has_room(found, count); first += kBlock) {
    for (size_t q = 0; q < count; ++q) {
      const uint64_t* place = bits + first * words;
      const uint64_t* query = queries[q];
      __m512i counts[8];
#pragma GCC unroll 8
      for (auto& sum : counts) {
        sum = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (size_t w = 0; w < words; ++w, place += kBitGroup) {
          const __m512i spread = _mm512_set1_epi64(static_cast<int64_t>(query[w]));
          sum = _mm512_add_epi64(
              sum, _mm512_popcnt_epi64(_mm512_xor_si512(_mm512_loadu_si512(place), spread)));
        }
      }
      __m512i pairs[4];  // rows 0 8 1 9 ... of 16
      for (size_t i = 0; i < 4; ++i)
        pairs[i] = _mm512_or_si512(counts[2 * i], _mm512_slli_epi64(counts[2 * i + 1], 32));
      const __m512i least = _mm512_min_epi32(_mm512_min_epi32(pairs[0], pairs[1]),
                                             _mm512_min_epi32(pairs[2], pairs[3]));
      const int32_t above = found[q]->threshold;
      const __m512i limit =
          _mm512_set1_epi32(above < -INT32_MAX ? INT32_MAX : -above);  // fewer than this
      if (!_mm512_cmplt_epi32_mask(least, limit)) continue;
      for (size_t i = 0; i < 4; ++i) {
        unsigned mask = _mm512_cmplt_epi32_mask(pairs[i], limit);
        if (!mask) continue;
        alignas(64) int32_t different[16];
        _mm512_store_si512(different, pairs[i]);
        for (; mask; mask &= mask - 1) {
          const auto lane = static_cast<size_t>(__builtin_ctz(mask));
          found[q]->add(-different[lane], first + 16 * i + lane / 2 + lane % 2 * 8, end);
        }
      }
    }
  }
  return first;
}

size_t scan_bits(const uint64_t* bits, size_t first, size_t end, size_t words,
                 const uint64_t* const* queries, size_t count, Found* const* found) {
  switch (words) {
    case 1: return scan_bits_of<1>(bits, first, end, words, queries, count, found);
    case 2: return scan_bits_of<2>(bits, first, end, words, queries, count, found);
    case 4: return scan_bits_of<4>(bits, first, end, words, queries, count, found);
    case 8: return scan_bits_of<8>(bits, first, end, words, queries, count, found);
    default: return scan_bits_of<0>(bits, first, end, words, queries, count, found);
  }
}

inline __m512 load(const uint16_t* row) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
}
inline __m512 load(const float* row) { return _mm512_loadu_ps(row); }
inline __m512 load(const uint16_t* row, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, row));
}
inline __m512 load(const float* row, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, row); }

template <class T>
void dot(const T* const* rows, const float* query, size_t n, float* dots, float* squares) {
  __m512 products[kTogether], powers[kTogether];
  for (size_t r = 0; r < kTogether; ++r) products[r] = powers[r] = _mm512_setzero_ps();
  const auto step = [&](size_t i, auto... mask) {
    __m512 q;
    if constexpr (sizeof...(mask) > 0)
      q = _mm512_maskz_loadu_ps(mask..., query + i);
    else
      q = _mm512_loadu_ps(query + i);
#pragma GCC unroll 4
    for (size_t r = 0; r < kTogether; ++r) {
      const __m512 x = load(rows[r] + i, mask...);
      products[r] = _mm512_fmadd_ps(x, q, products[r]);
      powers[r] = _mm512_fmadd_ps(x, x, powers[r]);
    }
  };
  size_t i = 0;
  for (; i + 16 <= n; i += 16) step(i);
  if (i < n) step(i, static_cast<__mmask16>((1u << (n - i)) - 1));
  for (size_t r = 0; r < kTogether; ++r) {
    dots[r] += _mm512_reduce_add_ps(products[r]);
    squares[r] += _mm512_reduce_add_ps(powers[r]);
  }
}

}  // namespace

const Kernels kVnni = {"avx512-vnni", scan_codes, scan_bits, dot<uint16_t>, dot<float>};

}  // namespace matryoshka::search
