// Which part of an image a sample uses: pure functions of (seed, epoch, index) and the image's
// size.
#pragma once

#include <array>
#include <cstdint>

namespace matryoshka {

struct Crop {
  int32_t x, y, width, height, flip;
};

struct Range {
  double low, high;
};

// The Philox4x64-10 bijection of Salmon et al. (2011) of exactly this counter. NumPy's Philox adds
// one to its counter before each block: Philox(counter=c, key=k).random_raw(4) is philox(c + 1, k).
std::array<uint64_t, 4> philox(std::array<uint64_t, 4> counter, std::array<uint64_t, 2> key);

// torchvision's RandomResizedCrop and a horizontal flip, drawn from the streams of (seed, epoch,
// index): attempt k = 0..9 uses the block philox({index, k, 0, 0}, {seed, epoch}), its words in
// order for area scale, aspect ratio, x, y; the flip uses word 0 of block k = 10. An image without
// pixels gets an empty crop.
Crop random_crop(int32_t width, int32_t height, uint64_t index, uint64_t seed, uint64_t epoch,
                 Range scale, Range ratio, double flip);

// The central square whose side is `ratio` of the shorter side, rounded down, at least 1.
Crop center_crop(int32_t width, int32_t height, double ratio);

}  // namespace matryoshka
