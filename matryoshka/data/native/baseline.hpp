// Decodes the blocks of a baseline JPEG that a crop touches to planes: Y, Cb, Cr, each with its own
// resolution, the same samples that libjpeg's accurate integer DCT makes. For training: no chroma
// upsampling, no RGB.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bytes.hpp"
#include "crop.hpp"
#include "entropy.hpp"
#include "huffman.hpp"
#include "image.hpp"
#include "status.hpp"
#include "tiles.hpp"

namespace matryoshka {

class BaselineDecoder {
 public:
  // The stream `tiles` has parsed: can it be decoded here?
  bool accepts(const Tiles& tiles);
  // After accepts. Planes of the crop, valid until the next call; too_large beyond some megabytes.
  Status decode(Tiles& tiles, const Crop& crop);
  int planes() const { return scan_.components; }
  const PlaneView* views() const { return plane_; }

 private:
  int64_t end_of_wanted(int64_t begin, int64_t end) const;

  HuffmanTable tables_[2][4] = {};
  uint16_t factors_[4][kZigzag] = {};
  BlockScan scan_{};
  PlaneView plane_[3] = {};
  std::vector<uint8_t> memory_;
};

}  // namespace matryoshka
