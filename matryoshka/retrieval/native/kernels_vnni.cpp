// For x86-64 with AVX-512 F, BW, VL, VNNI and VPOPCNTDQ.
#include "kernels.hpp"

#include <immintrin.h>

#include <cstring>

namespace matryoshka::search {
namespace {

size_t scan_codes(const uint8_t* codes, size_t first, size_t end, size_t chunks, const int8_t* query, Found& found) {
  const size_t group = chunks * kGroup * kChunk;  // bytes
  for (; first < end && found.room >= kBlock; first += kBlock) {
    const uint8_t* at = codes + first * chunks * kChunk;
    __m512i sums[4];
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    for (size_t c = 0; c < chunks; ++c, at += kGroup * kChunk) {
      int32_t four;
      std::memcpy(&four, query + c * kChunk, 4);
      const __m512i q = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        sums[i] = _mm512_dpbusd_epi32(sums[i], _mm512_loadu_si512(at + static_cast<size_t>(i) * group), q);
    }
    const __m512i threshold = _mm512_set1_epi32(found.threshold);
    const __m512i best = _mm512_max_epi32(_mm512_max_epi32(sums[0], sums[1]), _mm512_max_epi32(sums[2], sums[3]));
    if (!_mm512_cmpgt_epi32_mask(best, threshold)) continue;
    for (int i = 0; i < 4; ++i) {
      unsigned mask = _mm512_cmpgt_epi32_mask(sums[i], threshold);
      if (!mask) continue;
      alignas(64) int32_t scores[16];
      _mm512_store_si512(scores, sums[i]);
      for (; mask; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        const size_t row = first + static_cast<size_t>(16 * i + lane);
        if (row >= end) break;
        found.keys[found.count++] = make_key(scores[lane], static_cast<uint32_t>(row));
        --found.room;
      }
    }
  }
  return first;
}

size_t scan_bits(const uint64_t* bits, size_t first, size_t end, size_t words, const uint64_t* query, Found& found) {
  for (; first < end && found.room >= kBlock; first += kBlock) {
    const uint64_t* place = bits + first * words;
    __m512i counts[8];
    for (auto& count : counts) {
      count = _mm512_setzero_si512();
      for (size_t w = 0; w < words; ++w, place += kBitGroup) {
        const __m512i different = _mm512_xor_si512(_mm512_loadu_si512(place), _mm512_set1_epi64(static_cast<int64_t>(query[w])));
        count = _mm512_add_epi64(count, _mm512_popcnt_epi64(different));
      }
    }
    const __m512i limit = _mm512_set1_epi64(-static_cast<int64_t>(found.threshold));
    for (int i = 0; i < 8; ++i) {
      unsigned mask = _mm512_cmplt_epi64_mask(counts[i], limit);
      if (!mask) continue;
      alignas(64) int64_t different[8];
      _mm512_store_si512(different, counts[i]);
      for (; mask; mask &= mask - 1) {
        const int lane = __builtin_ctz(mask);
        const size_t row = first + static_cast<size_t>(8 * i + lane);
        if (row >= end) break;
        found.keys[found.count++] = make_key(static_cast<int32_t>(-different[lane]), static_cast<uint32_t>(row));
        --found.room;
      }
    }
  }
  return first;
}

}  // namespace

// Re-ranking waits for memory: AVX2 is as fast.
const Kernels kVnni = {"avx512-vnni", scan_codes, scan_bits,
                       [](const uint16_t* const* rows, const float* query, size_t n, float* dots, float* squares) {
                         kAvx2.dot_half(rows, query, n, dots, squares);
                       },
                       [](const float* const* rows, const float* query, size_t n, float* dots, float* squares) {
                         kAvx2.dot_single(rows, query, n, dots, squares);
                       }};

}  // namespace matryoshka::search
