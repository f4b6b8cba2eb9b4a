// What the kernels decode: plain data, without any library's inline functions, since those would be
// compiled for several CPUs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "huffman.hpp"

namespace matryoshka {

constexpr int kZigzag = 64 + kEndOfBlock;  // one run leads this far

// The work of decode_blocks: MCUs [first, last) of one segment.
struct BlockScan {
  struct Component {
    int h, v;
    const HuffmanTable *dc, *ac;
    const uint16_t* factors;  // of dequantisation, in zigzag order, [kZigzag]
    uint8_t* plane;           // of the MCUs in the box
    size_t stride;
    int32_t prediction;
  };
  const uint8_t* data;  // without stuffed zeros; kSegmentPadding bytes are readable behind the end
  size_t size;
  int components;
  Component component[3];
  int columns;                   // MCUs in a row of the image
  int left, right, top, bottom;  // the box of MCUs that is wanted
  int64_t first, last;
  bool complete;  // the segment ends with MCU `last`, and another one follows
};

// What a damaged block may read behind the end before that is noticed: 64 codes of 16 + 15 bits.
constexpr size_t kSegmentPadding = 64 * 4 + 64;

}  // namespace matryoshka
