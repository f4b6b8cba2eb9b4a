// Proof of a lossless copy: the source and the copy are read by other code than the code that made
// the copy, and must have the same coefficients and the same parameters.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "bytes.hpp"
#include "entropy.hpp"
#include "huffman.hpp"
#include "status.hpp"
#include "tiles.hpp"

struct jpeg_decompress_struct;
struct jvirt_barray_control;

namespace matryoshka {

// What libjpeg has read of a source, for writing it.
struct Original {
  jpeg_decompress_struct* info;
  jvirt_barray_control** coefficients;
  int mcu_blocks;  // of an MCU, side by side
};

class Proof {
 public:
  Proof();
  ~Proof();
  Proof(const Proof&) = delete;
  Proof& operator=(const Proof&) = delete;

  // Whether `copy` has the size, sampling, colour space, quantisation tables and coefficients of a
  // baseline JPEG whose segments `tiles` has found. libjpeg reads the headers. The scan is read
  // code by code, in half of libjpeg's time, and all damage is refused; the copier skips several
  // codes at a time.
  bool holds(Bytes jpeg, Tiles& tiles, Bytes copy);

  // The same with libjpeg alone, for other kinds of JPEG and for damage that libjpeg tolerates.
  // First read the source: grey, YCbCr or RGB, baseline, and accepted by JpegDecoder.
  Status read(Bytes jpeg);
  Original original();
  bool holds(Bytes copy);

  // Release the memory of the images.
  void close();

 private:
  struct State;

  bool same_blocks(Tiles& tiles);
  bool build_tables(const Frame& frame, int side);

  std::unique_ptr<State> state_;
  std::vector<const int16_t*> rows_;  // of blocks
  Tiles copy_tiles_;
  HuffmanTable dc_tables_[2][4] = {}, ac_tables_[2][4] = {};  // of the source and of the copy
  CompareJob job_{};
};

}  // namespace matryoshka
