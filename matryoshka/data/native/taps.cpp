#include "taps.hpp"

#include <algorithm>

namespace matryoshka {

constexpr int64_t kOne = 65536;

void Taps::compute(int64_t start, int64_t length, int64_t sub, int target) {
  spans_.resize(target);
  weights_.clear();
  longest_ = 0;
  const auto push =
      [this](int64_t weight) {  // a lone tap of 65536 does not fit: 65535 gives the same pixels
        weights_.push_back(static_cast<uint16_t>(std::min<int64_t>(weight, kOne - 1)));
      };
  const int64_t inside = start % sub;  // pixels of the first sample before the crop
  samples_ = static_cast<int>((inside + length + sub - 1) / sub);
  const int64_t unit = int64_t{target} * sub;  // one sample, where one pixel is `target`
  for (int64_t i = 0; i < target; ++i) {
    Span& span = spans_[i];
    span.weights = weights_.size();
    if (unit <= length) {
      // Output i covers [low, high). Rounding the running total, not each weight, makes every run
      // sum up to 65536.
      const int64_t low = inside * target + i * length, high = low + length;
      const int64_t first = low / unit, last = (high - 1) / unit;
      int64_t before = 0;
      for (int64_t k = first; k <= last; ++k) {
        const int64_t covered = std::min((k + 1) * unit, high) - low;
        const int64_t total = (covered * kOne + length / 2) / length;
        push(total - before);
        before = total;
      }
      span.start = static_cast<int32_t>(first);
      span.count = static_cast<int32_t>(last - first + 1);
    } else {
      // Twice the distance of output i's centre from the first sample's.
      const int64_t centre =
          std::max<int64_t>(2 * inside * target + (2 * i + 1) * length - unit, 0);
      int64_t first = centre / (2 * unit);
      int64_t second_weight = (centre % (2 * unit) * kOne + unit) / (2 * unit);
      if (second_weight == kOne) ++first, second_weight = 0;
      if (first >= samples_ - 1) first = samples_ - 1, second_weight = 0;
      push(kOne - second_weight);
      if (second_weight) push(second_weight);
      span.start = static_cast<int32_t>(first);
      span.count = second_weight ? 2 : 1;
    }
    longest_ = std::max(longest_, span.count);
  }
}

void Taps::compute_columns(int64_t start, int64_t length, int64_t sub, int target, bool mirror) {
  compute(start, length, sub, target);
  const int padded = (target + 7) / 8 * 8;
  starts_.resize(padded);
  even_.assign(static_cast<size_t>(padded) * longest_, 0);
  for (int x = 0; x < padded; ++x) {
    const int i = std::min(x, target - 1);
    const Span& span = spans_[mirror ? target - 1 - i : i];
    const int first = std::min(span.start, samples_ - longest_);
    starts_[x] = first;
    uint32_t* even = even_.data() + static_cast<size_t>(x) * longest_ + (span.start - first);
    for (int k = 0; k < span.count; ++k) even[k] = weights_[span.weights + k] * 0x10001u;
  }
}

}  // namespace matryoshka
