// Scan kernels for any CPU: plain loops that the compiler can vectorise.
#include "scan_kernels.hpp"

#include <cstring>

#if defined(_MSC_VER)
#include <intrin.h>
#endif

namespace matryoshka::search {
namespace {

// IEEE 754 half precision to single, without hardware support.
float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t rest = half & 0x7fffu;
  uint32_t bits;
  if (rest >= 0x7c00u) {  // infinity, NaN
    bits = sign | 0x7f800000u | (rest & 0x3ffu) << 13;
  } else if (rest >= 0x400u) {
    bits = sign | ((rest << 13) + 0x38000000u);
  } else {  // subnormal: exact in single precision
    const float value = static_cast<float>(rest) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

size_t scan_codes(const uint8_t* codes, size_t first, size_t end, size_t chunks,
                  const int8_t* const* queries, size_t count, HitBuffer* const* hits) {
  for (; first < end && has_room(hits, count); first += kBlock) {
    for (size_t at = 0; at < count * kBlock; at += kGroup) {
      const size_t q = at / kBlock;
      const size_t group = at % kBlock;
      int32_t scores[kGroup] = {};
      const uint8_t* chunk = codes + (first + group) * chunks * kChunk;
      for (size_t c = 0; c < chunks; ++c, chunk += kGroup * kChunk) {
        for (size_t row = 0; row < kGroup; ++row) {
          int32_t sum = 0;
          for (size_t i = 0; i < kChunk; ++i)
            sum += chunk[row * kChunk + i] * queries[q][c * kChunk + i];
          scores[row] += sum;
        }
      }
      for (size_t row = 0; row < kGroup; ++row) hits[q]->add(scores[row], first + group + row, end);
    }
  }
  return first;
}

inline int popcount(uint64_t x) {
#if defined(__GNUC__)
  return __builtin_popcountll(x);
#else
  return static_cast<int>(__popcnt64(x));
#endif
}

size_t scan_bits(const uint64_t* bits, size_t first, size_t end, size_t words,
                 const uint64_t* const* queries, size_t count, HitBuffer* const* hits) {
  for (; first < end && has_room(hits, count); first += kBlock) {
    for (size_t at = 0; at < count * kBlock; at += kBitGroup) {
      const size_t q = at / kBlock;
      const size_t group = at % kBlock;
      int32_t scores[kBitGroup] = {};
      const uint64_t* word = bits + (first + group) * words;
      for (size_t w = 0; w < words; ++w)
        for (size_t row = 0; row < kBitGroup; ++row)
          scores[row] -= popcount(*word++ ^ queries[q][w]);
      for (size_t row = 0; row < kBitGroup; ++row)
        hits[q]->add(scores[row], first + group + row, end);
    }
  }
  return first;
}

template <class T, class Convert>
void dot(const T* row, const float* query, size_t n, float* dot, float* squares, Convert convert) {
  float products[8] = {}, squared[8] = {};
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (size_t j = 0; j < 8; ++j) {
      const float x = convert(row[i + j]);
      products[j] += x * query[i + j];
      squared[j] += x * x;
    }
  }
  for (; i < n; ++i) {
    const float x = convert(row[i]);
    products[0] += x * query[i];
    squared[0] += x * x;
  }
  for (size_t j = 0; j < 8; ++j) {
    *dot += products[j];
    *squares += squared[j];
  }
}

void dot_half(const uint16_t* const* rows, const float* query, size_t n, float* dots,
              float* squares) {
  for (size_t r = 0; r < kRowsPerDot; ++r)
    dot(rows[r], query, n, dots + r, squares + r, half_to_float);
}

void dot_single(const float* const* rows, const float* query, size_t n, float* dots,
                float* squares) {
  const auto identity = [](float x) { return x; };
  for (size_t r = 0; r < kRowsPerDot; ++r) dot(rows[r], query, n, dots + r, squares + r, identity);
}

}  // namespace

const Kernels kPortable = {"portable", scan_codes, scan_bits, dot_half, dot_single};

}  // namespace matryoshka::search
