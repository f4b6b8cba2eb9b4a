// Huffman decoding tables: one look-up gives run, value and length of most coefficients.
#pragma once

#include <cstddef>
#include <cstdint>

namespace matryoshka {

constexpr int kLookupBits = 10;  // of HuffmanTable::lookup; libjpeg's jdhuff.c has HUFF_LOOKAHEAD 8
constexpr int kSkipBits = 12;    // of HuffmanTable::skip
constexpr uint32_t kSlowFlag = 0x80;  // code and value together are longer than kLookupBits
constexpr int kEndOfBlock = 128;      // as a run: leads beyond the 64th coefficient

struct HuffmanTable {
  // By the next kLookupBits bits. Bits 0-4: length of code and value; 8-15: zeros before the value;
  // 16-31: the value, signed. With kSlowFlag: length of the code alone (0: above kLookupBits),
  // zeros before, number of the value's bits.
  uint32_t lookup[1 << kLookupBits];
  // AC tables only, for blocks whose values are not needed: all complete coefficients within the
  // next kSkipBits bits at once. Bits 0-3: their length (0: not even one is complete); 4-10: the
  // number of coefficients; 11: whether the block ends with them.
  uint16_t skip[1 << kSkipBits];
  // DECODE (T.81, figures F.15 and F.16) for longer codes, by length.
  int32_t code_end[18];      // MAXCODE + 1, left-aligned to 16 bits; the last one is a sentinel
  int32_t value_offset[17];  // VALPTR - MINCODE: index of a value in huffval minus its code
  uint8_t huffval[256];
  uint8_t definition[16 + 256];  // the BITS and HUFFVAL lists that `build` received
  bool valid;

  // definition: the 16 counts of BITS, then HUFFVAL (T.81, B.2.4.2). False if they do not form a
  // Huffman code for DC or AC coefficients. Costs nothing for the table that is already here.
  bool build(const uint8_t* definition, size_t size, bool dc);

 private:
  void build_skip();
};

// T.81, F.2.2.1, figure F.12 (EXTEND): the signed value of `size` bits.
inline int32_t extend(uint32_t bits, int size) {
  const bool negative = size > 0 && bits < (1u << (size - 1));
  const int32_t value = static_cast<int32_t>(bits);
  return negative ? value - (1 << size) + 1 : value;
}

}  // namespace matryoshka
