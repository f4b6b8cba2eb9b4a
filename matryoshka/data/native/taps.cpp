#include "taps.hpp"

#include <algorithm>

namespace matryoshka {

constexpr int64_t kOne = 65536;  // weight 1

// A lone tap of 65536 does not fit into 16 bits; 65535 gives the same pixels.
void Taps::add_weight(int64_t weight) {
  weights_.push_back(static_cast<uint16_t>(std::min<int64_t>(weight, kOne - 1)));
}

// An output sample that covers [begin, begin + length); a source sample is `unit` long.
void Taps::add_area(int64_t begin, int64_t length, int64_t unit) {
  const size_t weights = weights_.size();
  const int64_t end = begin + length;
  const int64_t first = begin / unit;
  const int64_t last = (end - 1) / unit;
  // Rounding the running total, not each weight, makes every span sum to 65536.
  int64_t previous_total = 0;
  for (int64_t k = first; k <= last; ++k) {
    const int64_t covered = std::min((k + 1) * unit, end) - begin;
    const int64_t total = (covered * kOne + length / 2) / length;
    add_weight(total - previous_total);
    previous_total = total;
  }
  spans_.push_back({static_cast<int32_t>(first), static_cast<int32_t>(last - first + 1), weights});
}

// An output sample whose centre is `centre` / 2 behind the first source sample's centre.
void Taps::add_bilinear(int64_t centre, int64_t unit) {
  const size_t weights = weights_.size();
  int64_t first = centre / (2 * unit);
  int64_t second_weight = (centre % (2 * unit) * kOne + unit) / (2 * unit);
  if (second_weight == kOne) {
    ++first;
    second_weight = 0;
  }
  if (first >= source_size_ - 1) {  // clamp to the last sample
    first = source_size_ - 1;
    second_weight = 0;
  }
  add_weight(kOne - second_weight);
  if (second_weight) add_weight(second_weight);
  spans_.push_back({static_cast<int32_t>(first), second_weight ? 2 : 1, weights});
}

void Taps::compute(int64_t start, int64_t length, int64_t subsampling, int target) {
  spans_.clear();
  spans_.reserve(target);
  weights_.clear();
  max_taps_ = 0;
  const int64_t offset = start % subsampling;  // pixels of the first sample before the crop
  source_size_ = static_cast<int>((offset + length + subsampling - 1) / subsampling);
  // All positions are integers, in units of 1 / target pixel: a sample is `unit` long, and an
  // output sample is `length`.
  const int64_t unit = int64_t{target} * subsampling;
  for (int64_t i = 0; i < target; ++i) {
    if (unit <= length) {
      add_area(offset * target + i * length, length, unit);
    } else {
      const int64_t centre = 2 * offset * target + (2 * i + 1) * length - unit;
      add_bilinear(std::max<int64_t>(centre, 0), unit);
    }
    max_taps_ = std::max(max_taps_, spans_.back().count);
  }
}

void Taps::compute_columns(int64_t start, int64_t length, int64_t subsampling, int target,
                           bool mirror) {
  compute(start, length, subsampling, target);
  const int padded = (target + 7) / 8 * 8;
  starts_.resize(padded);
  paired_.assign(static_cast<size_t>(padded) * max_taps_, 0);
  for (int x = 0; x < padded; ++x) {
    const int i = std::min(x, target - 1);
    const Span& span = spans_[mirror ? target - 1 - i : i];
    // A longer span must not reach beyond the last sample: it begins earlier, with zero weights.
    const int first = std::min(span.start, source_size_ - max_taps_);
    starts_[x] = first;
    uint32_t* paired = paired_.data() + static_cast<size_t>(x) * max_taps_ + (span.start - first);
    for (int k = 0; k < span.count; ++k) paired[k] = weights_[span.weights + k] * 0x10001u;
  }
}

}  // namespace matryoshka
