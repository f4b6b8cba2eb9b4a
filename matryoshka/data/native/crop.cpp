#include "crop.hpp"

#include <algorithm>
#include <cmath>

namespace matryoshka {
namespace {

constexpr int kAttempts = 10;  // as in torchvision

struct Product {
  uint64_t high, low;
};

Product multiply(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return {static_cast<uint64_t>(product >> 64), static_cast<uint64_t>(product)};
}

// A number in [0, 1) with 53 random bits, as NumPy's random().
double uniform(uint64_t word) { return static_cast<double>(word >> 11) * 0x1p-53; }

double uniform_in(Range range, uint64_t word) {
  return range.low + uniform(word) * (range.high - range.low);
}

// Ties go to even, like Python's round.
double round_even(double value) { return std::nearbyint(value); }

}  // namespace

std::array<uint64_t, 4> philox(std::array<uint64_t, 4> counter, std::array<uint64_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const Product a = multiply(0xD2E7470EE14C6C93u, counter[0]);
    const Product b = multiply(0xCA5A826395121157u, counter[2]);
    counter = {b.high ^ counter[1] ^ key[0], b.low, a.high ^ counter[3] ^ key[1], a.low};
    key[0] += 0x9E3779B97F4A7C15u;
    key[1] += 0xBB67AE8584CAA73Bu;
  }
  return counter;
}

Crop random_crop(int32_t width, int32_t height, const Draw& draw, Range scale, Range ratio,
                 double flip) {
  if (width < 1 || height < 1) return {0, 0, 0, 0, 0};
  const auto block = [&](uint64_t k) {
    return philox({draw.index, k, draw.view, 0}, {draw.seed, draw.epoch});
  };
  const int32_t flipped = uniform(block(kAttempts)[0]) < flip;
  const double area = static_cast<double>(width) * height;
  const Range log_ratio{std::log(ratio.low), std::log(ratio.high)};
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    const auto words = block(attempt);
    const double target = area * uniform_in(scale, words[0]);
    const double aspect = std::exp(uniform_in(log_ratio, words[1]));
    const double w = round_even(std::sqrt(target * aspect));
    const double h = round_even(std::sqrt(target / aspect));
    if (!(0 < w && w <= width && 0 < h && h <= height)) continue;
    const double x = std::floor(uniform(words[2]) * (width - w + 1));
    const double y = std::floor(uniform(words[3]) * (height - h + 1));
    return {static_cast<int32_t>(x), static_cast<int32_t>(y), static_cast<int32_t>(w),
            static_cast<int32_t>(h), flipped};
  }
  // No attempt fitted: take the largest central crop with an allowed aspect ratio.
  const double aspect = static_cast<double>(width) / height;
  double w = width;
  double h = height;
  if (aspect < ratio.low) h = round_even(w / ratio.low);
  if (aspect > ratio.high) w = round_even(h * ratio.high);
  const auto crop_width = static_cast<int32_t>(std::clamp(w, 1.0, static_cast<double>(width)));
  const auto crop_height = static_cast<int32_t>(std::clamp(h, 1.0, static_cast<double>(height)));
  return {(width - crop_width) / 2, (height - crop_height) / 2, crop_width, crop_height, flipped};
}

Crop center_crop(int32_t width, int32_t height, double ratio) {
  if (width < 1 || height < 1) return {0, 0, 0, 0, 0};
  const int32_t side = std::max(1, static_cast<int32_t>(ratio * std::min(width, height)));
  return {(width - side) / 2, (height - side) / 2, side, side, 0};
}

}  // namespace matryoshka
