// Huffman tables for entropy-inl.hpp: one look-up gives run, value and length of most coefficients.
#pragma once

#include <cstddef>
#include <cstdint>

namespace matryoshka {

constexpr int kFastBits = 10, kSkipBits = 12;
constexpr uint32_t kSlow = 0x80;  // of an entry: code and value do not fit into kFastBits together
constexpr int kEndOfBlock = 128;  // instead of a run: leads behind the 64th coefficient

// Of an entry: bits 0-4 length of code and value, 8-15 zeros before the value, 16-31 the value
// (signed). With kSlow: length of the code alone (0: longer than kFastBits), zeros before, size of
// the value.
struct HuffmanTable {
  uint32_t fast[1 << kFastBits];
  // Of AC, for blocks whose values nobody wants: all codes that fit into kSkipBits with their
  // values. Bits 0-3 their length (0: none fits), 4-10 coefficients passed, 11 whether the block
  // ends with them.
  uint16_t skip[1 << kSkipBits];
  int32_t last_code[18];  // of each length, left-aligned to 16 bits; then a sentinel
  int32_t offset[17];     // index of a symbol - its code, by length
  uint8_t symbols[256];
  uint8_t definition[16 + 256];  // what it was made from
  bool valid;

  // Definition: 16 counts, then the symbols. False if it is no Huffman code, or not one for these
  // coefficients.
  bool define(const uint8_t* definition, size_t size, bool dc);

 private:
  void define_skips();
};

}  // namespace matryoshka
