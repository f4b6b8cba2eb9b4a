// The work of the entropy decoding kernel as plain data. Kernel files are compiled for several
// CPUs: a library's inline functions must not be compiled there, since the linker might keep those
// copies.
#pragma once

#include <cstddef>
#include <cstdint>

#include "huffman.hpp"

namespace matryoshka {

// Size of arrays in zigzag order: a run of kEndOfBlock from the last coefficient ends inside them,
// so that decoding needs no bounds check.
constexpr int kZigzagSize = 64 + kEndOfBlock;

// MCUs [first, last) of one segment, for decode_blocks.
struct DecodeJob {
  struct Component {
    int h, v;  // sampling factors: blocks of an MCU, on either axis
    const HuffmanTable *dc, *ac;
    const uint16_t* quant_table;  // in zigzag order, [kZigzagSize]
    uint8_t* plane;               // output: the samples of the MCUs in the box
    size_t stride;
    int32_t dc_pred;  // PRED of T.81, F.1.1.5.1: the last block's DC coefficient
  };
  const uint8_t* data;  // unstuffed; kSegmentPadding bytes are readable behind the end
  size_t size;
  int components;
  Component component[3];
  int mcus_per_row;              // of the image
  int left, right, top, bottom;  // the box of MCUs to decode; others are skipped
  const uint8_t* wanted;         // whether to decode each MCU of the box, row by row; null: all
  int64_t first, last;
  bool complete;  // the segment ends with MCU `last`, and another segment follows

  size_t box_place(int row, int column) const {
    return static_cast<size_t>(row - top) * (right - left) + (column - left);
  }
};

// MCUs [first, last) of two JPEGs with the same AC codes, for equal_blocks. Each has its own
// segments and DC codes.
struct CompareJob {
  struct Side {
    const uint8_t* data;  // as of a DecodeJob
    size_t size;
    int64_t place;  // bits of the segment that were read
    bool complete;  // the segment ends with MCU `last`, and another one follows
    const HuffmanTable* dc[3];
    int32_t dc_pred[3];
  };
  Side side[2];
  const HuffmanTable* ac[3];
  int components;
  int blocks[3];  // of an MCU, by component
  int64_t first, last;
};

// A damaged block is noticed after its end: 64 codes of 16 + 15 bits, and a 64-byte margin.
constexpr size_t kSegmentPadding = 64 * 4 + 64;

}  // namespace matryoshka
