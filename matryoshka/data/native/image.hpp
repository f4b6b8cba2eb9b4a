// Views of pixels that someone else owns.
#pragma once

#include <cstddef>
#include <cstdint>

namespace matryoshka {

struct Image {
  uint8_t* pixels;  // RGB, [height, width, 3]
  int height, width;
};

// The part of one colour component that a crop covers.
struct PlaneView {
  const uint8_t* pixels;  // of the crop's first sample
  size_t stride;
  int sub_x, sub_y;  // subsampling: pixels per sample, on either axis
};

}  // namespace matryoshka
