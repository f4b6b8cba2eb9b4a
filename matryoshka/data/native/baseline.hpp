// Decodes the blocks of a baseline JPEG that crops touch to planes Y, Cb and Cr, each with its own
// resolution. The samples equal those of libjpeg's accurate integer DCT. For training: without
// chroma upsampling and without conversion to RGB.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bytes.hpp"
#include "entropy.hpp"
#include "huffman.hpp"
#include "image.hpp"
#include "status.hpp"
#include "tiles.hpp"
#include "view.hpp"

namespace matryoshka {

class BaselineDecoder {
 public:
  // Whether it can decode the JPEG that `tiles` has parsed. Prepares the tables.
  bool accepts(const Tiles& tiles);
  // After accepts: decode the crops of one or more views, every block once. too_large for planes of
  // more than 16 MB. Where this fails for some views together, it may work for one alone; where it
  // works, it would for each of them, with the same samples.
  Status decode(Tiles& tiles, const View* views, size_t count);
  // After decode: the planes from the first sample of one of these crops on. They are valid until
  // the next call of either function.
  const PlaneView* planes(const Crop& crop);
  int num_planes() const { return job_.components; }

 private:
  void set_box(const Frame& frame, const View* views, size_t count);
  void map_boxes(const Frame& frame, const View* views, size_t count);
  bool allocate_planes();
  int64_t needed_end(int64_t begin, int64_t end) const;

  HuffmanTable tables_[2][4] = {};  // DC, AC
  uint16_t quant_tables_[4][kZigzagSize] = {};
  DecodeJob job_{};
  PlaneView plane_[3] = {};
  std::vector<uint8_t> memory_, wanted_;
  std::vector<int64_t> probes_;
};

}  // namespace matryoshka
