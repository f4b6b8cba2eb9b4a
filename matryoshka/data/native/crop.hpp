// Crop boxes of samples: pure functions of (seed, epoch, index) and the image's size.
#pragma once

#include <array>
#include <cstdint>

namespace matryoshka {

struct Crop {
  int32_t x, y, width, height, flip;  // flip: 1 mirrors the columns
};

struct Range {
  double low, high;
};

// Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). NumPy adds
// one to the counter before each block: Philox(counter=c, key=k).random_raw(4) is philox(c + 1, k).
std::array<uint64_t, 4> philox(std::array<uint64_t, 4> counter, std::array<uint64_t, 2> key);

// What the random numbers of a crop depend on.
struct Draw {
  uint64_t index, seed, epoch;
  uint64_t view;  // of several crops of one image; 0 is the only one of a single crop
};

// torchvision's RandomResizedCrop and a horizontal flip. Attempt k = 0 .. 9 draws area scale,
// aspect ratio, x and y from the words of the block philox({index, k, view, 0}, {seed, epoch}); the
// flip uses word 0 of block 10. An image without pixels has an empty crop.
Crop random_crop(int32_t width, int32_t height, const Draw& draw, Range scale, Range ratio,
                 double flip);

// The central square with a side of `ratio` times the shorter side, rounded down, at least 1.
Crop center_crop(int32_t width, int32_t height, double ratio);

}  // namespace matryoshka
