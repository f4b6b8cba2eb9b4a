// Scan kernels for x86-64 with AVX2, FMA, F16C and POPCNT.
#include "scan_kernels.hpp"

#include <immintrin.h>

#include <cstring>

namespace matryoshka::search {
namespace {

// Repeat four query bytes in all lanes.
inline __m256i broadcast4(const int8_t* four) {
  int32_t bits;
  std::memcpy(&bits, four, 4);
  return _mm256_set1_epi32(bits);
}

size_t scan_codes(const uint8_t* codes, size_t first, size_t end, size_t chunks,
                  const int8_t* const* queries, size_t count, HitBuffer* const* hits) {
  const __m256i ones = _mm256_set1_epi16(1);
  const size_t group = chunks * kGroup * kChunk;  // bytes
  for (; first < end && has_room(hits, count); first += kBlock) {
    for (size_t query = 0; query < count; ++query) {
      const uint8_t* at = codes + first * chunks * kChunk;
      __m256i sums[8];  // the scores of 64 rows
      for (auto& sum : sums) sum = _mm256_setzero_si256();
      for (size_t c = 0; c < chunks; ++c, at += kGroup * kChunk) {
        const __m256i q = broadcast4(queries[query] + c * kChunk);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          const auto* line = reinterpret_cast<const __m256i*>(
              at + static_cast<size_t>(i / 2) * group + i % 2 * 32);
          // vpmaddubsw saturates at 16 bits: 7-bit codes stay below (scan_kernels.hpp).
          const __m256i pairs = _mm256_maddubs_epi16(_mm256_loadu_si256(line), q);
          sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, ones));
        }
      }

      // Once the threshold is high, this single test discards nearly every block.
      __m256i best = sums[0];
      for (int i = 1; i < 8; ++i) best = _mm256_max_epi32(best, sums[i]);
      const __m256i threshold = _mm256_set1_epi32(hits[query]->threshold);
      if (_mm256_testz_si256(_mm256_cmpgt_epi32(best, threshold), _mm256_set1_epi32(-1))) continue;
      for (size_t i = 0; i < 8; ++i) {
        auto mask = static_cast<unsigned>(
            _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(sums[i], threshold))));
        if (!mask) continue;
        alignas(32) int32_t scores[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(scores), sums[i]);
        for (; mask; mask &= mask - 1) {
          const auto lane = static_cast<size_t>(__builtin_ctz(mask));
          hits[query]->add(scores[lane], first + 8 * i + lane, end);
        }
      }
    }
  }
  return first;
}

// Population count of every byte: two look-ups of 4 bits each (Mula, Kurz, Lemire, arXiv
// 1611.07612).
inline __m256i count_bytes(__m256i x) {
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
  const __m256i mask = _mm256_set1_epi8(15);
  const __m256i low = _mm256_and_si256(x, mask);
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(x, 4), mask);
  return _mm256_add_epi8(_mm256_shuffle_epi8(table, low), _mm256_shuffle_epi8(table, high));
}

// The distances of 64 rows stay in registers, for one branch per block instead of one per row.
// kWords: the number of words where it is known at compile time, else 0.
template <size_t kWords>
size_t scan_bits_of(const uint64_t* bits, size_t first, size_t end, size_t words,
                    const uint64_t* const* queries, size_t count, HitBuffer* const* hits) {
  if (kWords) words = kWords;
  const __m256i zero = _mm256_setzero_si256();
  for (; first < end && has_room(hits, count); first += kBlock) {
    for (size_t query = 0; query < count; ++query) {
      const auto* line = reinterpret_cast<const __m256i*>(bits + first * words);
      __m256i counts[8];
      for (auto& group_counts : counts) {
        __m256i sum0 = zero, sum1 = zero;
        for (size_t w = 0; w < words;) {
          // Counts of bytes add up in 8 bits for 31 words: 31 x 8 < 256.
          const size_t bytes_end = w + 31 < words ? w + 31 : words;
          __m256i bytes0 = zero, bytes1 = zero;
          for (; w < bytes_end; ++w, line += 2) {
            const __m256i q = _mm256_set1_epi64x(static_cast<int64_t>(queries[query][w]));
            const __m256i differ0 = _mm256_xor_si256(_mm256_loadu_si256(line), q);
            const __m256i differ1 = _mm256_xor_si256(_mm256_loadu_si256(line + 1), q);
            bytes0 = _mm256_add_epi8(bytes0, count_bytes(differ0));
            bytes1 = _mm256_add_epi8(bytes1, count_bytes(differ1));
          }
          sum0 = _mm256_add_epi64(sum0, _mm256_sad_epu8(bytes0, zero));
          sum1 = _mm256_add_epi64(sum1, _mm256_sad_epu8(bytes1, zero));
        }
        // Two 64-bit counts share a lane: rows 0 4 1 5 2 6 3 7.
        group_counts = _mm256_or_si256(sum0, _mm256_slli_epi64(sum1, 32));
      }
      __m256i least = counts[0];
      for (int i = 1; i < 8; ++i) least = _mm256_min_epi32(least, counts[i]);
      HitBuffer& query_hits = *hits[query];
      // A distance below this limit is a score above the threshold; -INT32_MIN would overflow.
      const __m256i limit =
          _mm256_set1_epi32(query_hits.threshold < -INT32_MAX ? INT32_MAX : -query_hits.threshold);
      if (!_mm256_movemask_epi8(_mm256_cmpgt_epi32(limit, least))) continue;
      for (size_t i = 0; i < 8; ++i) {
        alignas(32) int32_t distances[8];
        _mm256_store_si256(reinterpret_cast<__m256i*>(distances), counts[i]);
        for (size_t j = 0; j < 8; ++j)
          query_hits.add(-distances[j % 4 * 2 + j / 4], first + 8 * i + j, end);
      }
    }
  }
  return first;
}

size_t scan_bits(const uint64_t* bits, size_t first, size_t end, size_t words,
                 const uint64_t* const* queries, size_t count, HitBuffer* const* hits) {
  switch (words) {
    case 1: return scan_bits_of<1>(bits, first, end, words, queries, count, hits);
    case 2: return scan_bits_of<2>(bits, first, end, words, queries, count, hits);
    case 4: return scan_bits_of<4>(bits, first, end, words, queries, count, hits);
    case 8: return scan_bits_of<8>(bits, first, end, words, queries, count, hits);
    default: return scan_bits_of<0>(bits, first, end, words, queries, count, hits);
  }
}

inline float sum(__m256 x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline __m256 load(const uint16_t* row) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
}
inline __m256 load(const float* row) { return _mm256_loadu_ps(row); }
inline float to_float(uint16_t x) { return _cvtsh_ss(x); }
inline float to_float(float x) { return x; }

template <class T>
void dot(const T* const* rows, const float* query, size_t n, float* dots, float* squares) {
  const T* row[kRowsPerDot];
  __m256 products[kRowsPerDot], squared[kRowsPerDot];
  for (size_t r = 0; r < kRowsPerDot; ++r) {
    row[r] = rows[r];
    products[r] = squared[r] = _mm256_setzero_ps();
  }
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 q = _mm256_loadu_ps(query + i);
#pragma GCC unroll 4
    for (size_t r = 0; r < kRowsPerDot; ++r) {
      const __m256 x = load(row[r] + i);
      products[r] = _mm256_fmadd_ps(x, q, products[r]);
      squared[r] = _mm256_fmadd_ps(x, x, squared[r]);
    }
  }
  for (size_t r = 0; r < kRowsPerDot; ++r) {
    float p = sum(products[r]);
    float s = sum(squared[r]);
    for (size_t j = i; j < n; ++j) {
      const float x = to_float(row[r][j]);
      p += x * query[j];
      s += x * x;
    }
    dots[r] += p;
    squares[r] += s;
  }
}

}  // namespace

const Kernels kAvx2 = {"avx2", scan_codes, scan_bits, dot<uint16_t>, dot<float>};

}  // namespace matryoshka::search
