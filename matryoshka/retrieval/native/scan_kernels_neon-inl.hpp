// Scan kernels for 64-bit ARM, compiled twice: for every such CPU, and with SDOT (four products of
// bytes in one instruction) for those since 2017. 7-bit codes are valid signed bytes.
#pragma once

#include <arm_neon.h>

#include <cstring>

#include "scan_kernels.hpp"

namespace matryoshka::search {
namespace {

#ifdef __ARM_FEATURE_DOTPROD
inline int32x4_t add_products(int32x4_t sums, int8x16_t codes, int8x16_t query) {
  return vdotq_s32(sums, codes, query);
}
#else
inline int32x4_t add_products(int32x4_t sums, int8x16_t codes, int8x16_t query) {
  const int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(query));
  const int16x8_t high = vmull_high_s8(codes, query);
  return vpadalq_s16(sums, vpaddq_s16(low, high));  // 2 x 127 x 127 fits into 16 bits
}
#endif

size_t scan_codes(const uint8_t* codes, size_t first, size_t end, size_t chunks,
                  const int8_t* const* queries, size_t count, HitBuffer* const* hits) {
  constexpr int kSums = kBlock / 4;
  const size_t group = chunks * kGroup * kChunk;  // bytes
  for (; first < end && has_room(hits, count); first += kBlock) {
    for (size_t query = 0; query < count; ++query) {
      const uint8_t* at = codes + first * chunks * kChunk;
      int32x4_t sums[kSums];
      for (auto& sum : sums) sum = vdupq_n_s32(0);
      for (size_t c = 0; c < chunks; ++c, at += kGroup * kChunk) {
        int32_t four;
        std::memcpy(&four, queries[query] + c * kChunk, 4);
        const int8x16_t q = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 16
        for (int i = 0; i < kSums; ++i) {
          const uint8_t* line = at + static_cast<size_t>(i / 4) * group + i % 4 * 16;
          sums[i] = add_products(sums[i], vreinterpretq_s8_u8(vld1q_u8(line)), q);
        }
      }
      int32x4_t best = sums[0];
      for (int i = 1; i < kSums; ++i) best = vmaxq_s32(best, sums[i]);
      if (vmaxvq_s32(best) <= hits[query]->threshold) continue;
      for (size_t i = 0; i < kSums; ++i) {
        int32_t scores[4];
        vst1q_s32(scores, sums[i]);
        for (size_t lane = 0; lane < 4; ++lane)
          hits[query]->add(scores[lane], first + 4 * i + lane, end);
      }
    }
  }
  return first;
}

size_t scan_bits(const uint64_t* bits, size_t first, size_t end, size_t words,
                 const uint64_t* const* queries, size_t count, HitBuffer* const* hits) {
  for (; first < end && has_room(hits, count); first += kBlock) {
    for (size_t at = 0; at < count * kBlock; at += kBitGroup) {
      const size_t query = at / kBlock;
      const size_t group = at % kBlock;
      const uint64_t* line = bits + (first + group) * words;
      uint32x4_t counts[2] = {vdupq_n_u32(0), vdupq_n_u32(0)};  // of 4 rows
      for (size_t w = 0; w < words;) {
        // Counts of bytes add up in 8 bits for 31 words: 31 x 8 < 256.
        const size_t bytes_end = w + 31 < words ? w + 31 : words;
        uint8x16_t bytes[4];  // of 2 rows each
        for (auto& count_of_bytes : bytes) count_of_bytes = vdupq_n_u8(0);
        for (; w < bytes_end; ++w, line += kBitGroup) {
          const uint64x2_t q = vdupq_n_u64(queries[query][w]);
          for (int i = 0; i < 4; ++i) {
            const uint64x2_t different = veorq_u64(vld1q_u64(line + 2 * i), q);
            bytes[i] = vaddq_u8(bytes[i], vcntq_u8(vreinterpretq_u8_u64(different)));
          }
        }
        // Eight 8-bit counts per row -> four of 16 bits -> two of 32 bits -> one.
        for (int i = 0; i < 2; ++i) {
          const uint32x4_t even = vpaddlq_u16(vpaddlq_u8(bytes[2 * i]));
          const uint32x4_t odd = vpaddlq_u16(vpaddlq_u8(bytes[2 * i + 1]));
          counts[i] = vaddq_u32(counts[i], vpaddq_u32(even, odd));
        }
      }
      const uint32_t least = vminvq_u32(vminq_u32(counts[0], counts[1]));
      if (-static_cast<int64_t>(least) <= hits[query]->threshold) continue;
      uint32_t distances[kBitGroup];
      vst1q_u32(distances, counts[0]);
      vst1q_u32(distances + 4, counts[1]);
      for (size_t i = 0; i < kBitGroup; ++i)
        hits[query]->add(-static_cast<int32_t>(distances[i]), first + group + i, end);
    }
  }
  return first;
}

inline float32x4_t load(const uint16_t* row) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(row)));
}
inline float32x4_t load(const float* row) { return vld1q_f32(row); }
inline float to_float(uint16_t x) {
  return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x))), 0);
}
inline float to_float(float x) { return x; }

template <class T>
void dot(const T* const* rows, const float* query, size_t n, float* dots, float* squares) {
  float32x4_t products[kRowsPerDot][2], squared[kRowsPerDot][2];
  for (size_t r = 0; r < kRowsPerDot; ++r)
    for (int j = 0; j < 2; ++j) products[r][j] = squared[r][j] = vdupq_n_f32(0);
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const float32x4_t q = vld1q_f32(query + i + 4 * j);
#pragma GCC unroll 4
      for (size_t r = 0; r < kRowsPerDot; ++r) {
        const float32x4_t x = load(rows[r] + i + 4 * j);
        products[r][j] = vfmaq_f32(products[r][j], x, q);
        squared[r][j] = vfmaq_f32(squared[r][j], x, x);
      }
    }
  }
  for (size_t r = 0; r < kRowsPerDot; ++r) {
    float p = vaddvq_f32(vaddq_f32(products[r][0], products[r][1]));
    float s = vaddvq_f32(vaddq_f32(squared[r][0], squared[r][1]));
    for (size_t j = i; j < n; ++j) {
      const float x = to_float(rows[r][j]);
      p += x * query[j];
      s += x * x;
    }
    dots[r] += p;
    squares[r] += s;
  }
}

}  // namespace
}  // namespace matryoshka::search
