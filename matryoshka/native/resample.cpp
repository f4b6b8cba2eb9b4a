#include "resample.hpp"

#include <algorithm>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

// The hot kernels are compiled a second time for AVX2 and chosen when the module is loaded; elsewhere (and under
// C libraries without ifunc) the baseline is used. The arithmetic is integer: every version gives the same pixels.
#if defined(__x86_64__) && defined(__ELF__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
#define MATRYOSHKA_MULTIVERSION __attribute__((target_clones("default", "avx2")))
#endif
#endif
#ifndef MATRYOSHKA_MULTIVERSION
#define MATRYOSHKA_MULTIVERSION
#endif

namespace matryoshka {
namespace {

// Up to this many taps the truncation of the 16-bit products stays below an eighth of a grey level.
constexpr int kMaxNarrowTaps = 64;

constexpr int64_t kOne = 65536;

using u32x4 = uint32_t __attribute__((vector_size(16)));

// Four 16-bit values as one vector of 32-bit lanes.
inline u32x4 load4(const uint16_t* values) {
#ifdef __SSE2__  // GCC makes five instructions of the portable form, and this is the innermost loop
  const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values));
  return reinterpret_cast<u32x4>(_mm_unpacklo_epi16(lanes, _mm_setzero_si128()));
#else
  uint16_t lanes __attribute__((vector_size(8)));
  std::memcpy(&lanes, values, sizeof lanes);
  return __builtin_convertvector(lanes, u32x4);
#endif
}

inline uint16_t scaled(uint8_t value, uint16_t weight) {
  return static_cast<uint16_t>((static_cast<uint32_t>(value << 8) * weight) >> 16);
}

}  // namespace

// The kernels. (GCC does not clone functions of an unnamed namespace.)

MATRYOSHKA_MULTIVERSION static void first_row(uint16_t* __restrict sum, const uint8_t* __restrict row, size_t n,
                                              uint16_t weight, uint16_t bias) {
  for (size_t i = 0; i < n; ++i) sum[i] = static_cast<uint16_t>(bias + scaled(row[i], weight));
}

MATRYOSHKA_MULTIVERSION static void add_row(uint16_t* __restrict sum, const uint8_t* __restrict row, size_t n,
                                            uint16_t weight) {
  for (size_t i = 0; i < n; ++i) sum[i] = static_cast<uint16_t>(sum[i] + scaled(row[i], weight));
}

// One output row from a row of 8.8 sums. Every pixel is one 4-lane vector, so sum needs one value past its end.
// All pixels have the same number of taps: a number that varies costs more in mispredicted branches than in taps.
template <int kTaps>  // 0: any number
[[gnu::always_inline]] inline void mix(uint8_t* __restrict out, const uint16_t* __restrict sum,
                                       const Taps::Span* __restrict spans, const uint32_t* __restrict weights,
                                       int n, int taps) {
  if (kTaps) taps = kTaps;
  for (int x = 0; x < n; ++x, out += 3, weights += taps) {
    const uint16_t* pixel = sum + 3 * static_cast<size_t>(spans[x].start);
    u32x4 total = {1u << 23, 1u << 23, 1u << 23, 1u << 23};
    for (int k = 0; k < taps; ++k) total += load4(pixel + 3 * static_cast<size_t>(k)) * weights[k];
    total >>= 24;
    out[0] = static_cast<uint8_t>(total[0]);
    out[1] = static_cast<uint8_t>(total[1]);
    out[2] = static_cast<uint8_t>(total[2]);
  }
}

MATRYOSHKA_MULTIVERSION static void mix_columns(uint8_t* out, const uint16_t* sum, const Taps::Span* spans,
                                                const uint32_t* weights, int n, int taps) {
  switch (taps) {
    case 1: return mix<1>(out, sum, spans, weights, n, taps);
    case 2: return mix<2>(out, sum, spans, weights, n, taps);
    case 3: return mix<3>(out, sum, spans, weights, n, taps);
    case 4: return mix<4>(out, sum, spans, weights, n, taps);
    default: return mix<0>(out, sum, spans, weights, n, taps);
  }
}

static void add_wide_row(uint32_t* __restrict sum, const uint8_t* __restrict row, size_t n, uint32_t weight) {
  for (size_t i = 0; i < n; ++i) sum[i] += row[i] * weight;
}

static void narrow_row(uint16_t* __restrict narrow, const uint32_t* __restrict sum, size_t n) {
  for (size_t i = 0; i < n; ++i) narrow[i] = static_cast<uint16_t>((sum[i] + 128) >> 8);
}

void Taps::compute(int source, int target) {
  spans_.resize(target);
  weights_.clear();
  const auto push = [this](int64_t weight) {  // a lone tap of 65536 does not fit: 65535 gives the same pixels
    weights_.push_back(static_cast<uint16_t>(std::min<int64_t>(weight, kOne - 1)));
  };
  for (int64_t i = 0; i < target; ++i) {
    Span& span = spans_[i];
    span.weights = weights_.size();
    if (target <= source) {
      // In units of 1/target of a source pixel, output i covers [low, high). Rounding the running total, not
      // each weight, makes every run sum up to exactly 65536.
      const int64_t low = i * source, high = low + source;
      const int64_t first = low / target, last = (high - 1) / target;
      int64_t before = 0;
      for (int64_t k = first; k <= last; ++k) {
        const int64_t covered = std::min((k + 1) * target, high) - low;
        const int64_t total = (covered * kOne + source / 2) / source;
        push(total - before);
        before = total;
      }
      span.start = static_cast<int32_t>(first);
      span.count = static_cast<int32_t>(last - first + 1);
    } else {
      // The centre of output i lies at (i + 1/2) * source / target - 1/2 source pixels.
      const int64_t centre = std::max<int64_t>((2 * i + 1) * source - target, 0), unit = 2 * int64_t{target};
      int64_t first = centre / unit;
      int64_t second_weight = (centre % unit * kOne + target) / unit;
      if (second_weight == kOne) ++first, second_weight = 0;
      if (first >= source - 1) first = source - 1, second_weight = 0;
      push(kOne - second_weight);
      if (second_weight) push(second_weight);
      span.start = static_cast<int32_t>(first);
      span.count = second_weight ? 2 : 1;
    }
  }
}

void Taps::compute_even(int source, int target, bool mirror) {
  compute(source, target);
  if (mirror) std::reverse(spans_.begin(), spans_.end());
  int longest = 0;
  for (const Span& span : spans_) longest = std::max(longest, span.count);
  even_weights_.assign(static_cast<size_t>(target) * longest, 0);
  size_t row = 0;
  for (Span& span : spans_) {
    const int start = std::min(span.start, source - longest);
    std::copy_n(weights_.begin() + span.weights, span.count, even_weights_.begin() + row + (span.start - start));
    span = {start, longest, row};
    row += longest;
  }
}

void Resampler::begin(int crop_width, int crop_height, bool flip, uint8_t* out, int out_height, int out_width) {
  rows_.compute(crop_height, out_height);
  columns_.compute_even(crop_width, out_width, flip);
  row_bytes_ = 3 * static_cast<size_t>(crop_width);
  sum_.resize(row_bytes_ + 1);
  enlarge_rows_ = out_height > crop_height;
  previous_ = nullptr;
  next_row_ = next_out_ = 0;
  out_ = out;
}

void Resampler::add(const uint8_t* row, const Taps::Span& span, int tap) {
  const uint16_t weight = rows_.weights()[span.weights + tap];
  if (span.count > kMaxNarrowTaps) {
    if (tap == 0) wide_sum_.assign(row_bytes_, 0);
    add_wide_row(wide_sum_.data(), row, row_bytes_, weight);
    if (tap == span.count - 1) narrow_row(sum_.data(), wide_sum_.data(), row_bytes_);
  } else if (tap == 0) {
    // Every product is truncated, by half a unit on average: begin with what the whole run will lose.
    first_row(sum_.data(), row, row_bytes_, weight, static_cast<uint16_t>(span.count / 2));
  } else {
    add_row(sum_.data(), row, row_bytes_, weight);
  }
}

void Resampler::emit() {
  mix_columns(out_, sum_.data(), columns_.spans(), columns_.even_weights(), columns_.size(),
              columns_.spans()->count);
  out_ += 3 * static_cast<size_t>(columns_.size());
  ++next_out_;
}

void Resampler::push(const uint8_t* row) {
  const Taps::Span* spans = rows_.spans();
  if (enlarge_rows_) {  // every output row that ends with this row
    for (; next_out_ < rows_.size(); emit()) {
      const Taps::Span& span = spans[next_out_];
      if (span.start + span.count - 1 != next_row_) break;
      if (span.count == 2) add(previous_, span, 0);
      add(row, span, span.count - 1);
    }
  } else {  // the output row in progress, and the next one where the border between them lies in this row
    while (next_out_ < rows_.size() && spans[next_out_].start <= next_row_) {
      const Taps::Span& span = spans[next_out_];
      const int tap = next_row_ - span.start;
      add(row, span, tap);
      if (tap < span.count - 1) break;
      emit();
    }
  }
  previous_ = row;
  ++next_row_;
}

}  // namespace matryoshka
