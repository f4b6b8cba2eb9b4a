// Decodes the blocks of a baseline JPEG that a crop touches to planes Y, Cb and Cr, each with its
// own resolution. The samples equal those of libjpeg's accurate integer DCT. For training: without
// chroma upsampling and without conversion to RGB.
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
  // Whether it can decode the JPEG that `tiles` has parsed. Prepares the tables.
  bool accepts(const Tiles& tiles);
  // After accepts: decode the crop. The planes are valid until the next call. too_large for planes
  // of more than 16 MB.
  Status decode(Tiles& tiles, const Crop& crop);
  int planes() const { return job_.components; }
  const PlaneView* views() const { return plane_; }

 private:
  void set_box(const Frame& frame, const Crop& crop);
  bool allocate_planes(const Crop& crop);
  int64_t needed_end(int64_t begin, int64_t end) const;

  HuffmanTable tables_[2][4] = {};  // DC, AC
  uint16_t quant_tables_[4][kZigzagSize] = {};
  DecodeJob job_{};
  PlaneView plane_[3] = {};
  std::vector<uint8_t> memory_;
};

}  // namespace matryoshka
