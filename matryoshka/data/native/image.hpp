#pragma once

#include <cstddef>
#include <cstdint>

namespace matryoshka {

struct Image {
  uint8_t* pixels;  // RGB, [height, width, 3]
  int height, width;
};

// A crop's part of one colour component.
struct PlaneView {
  const uint8_t* pixels;  // of the first sample that lies in the crop
  size_t stride;
  int sub_x, sub_y;  // pixels for one sample, on either axis
};

}  // namespace matryoshka
