// A crop of an image and where its pixels go.
#pragma once

#include "crop.hpp"
#include "image.hpp"

namespace matryoshka {

struct View {
  Crop crop;
  Image out;  // the crop is resized to it
};

}  // namespace matryoshka
