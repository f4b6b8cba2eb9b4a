#include "huffman.hpp"

#include <algorithm>
#include <cstring>

namespace matryoshka {
namespace {

uint32_t make_entry(int32_t high, uint32_t run, uint32_t low) {
  return static_cast<uint32_t>(high) << 16 | run << 8 | low;
}

// Fill the lookup entries that begin with this code. symbol: RRRRSSSS, run and size (T.81,
// F.1.2.2.1).
void add_code(uint32_t* lookup, uint32_t code, int length, uint8_t symbol, bool dc) {
  const int size = symbol & 15;
  const int free_bits = kLookupBits - length;
  const uint32_t run = dc ? 0 : symbol >> 4;
  uint32_t* entries = lookup + (code << free_bits);
  if (size == 0) {
    // A DC difference of zero, ZRL (16 zeros: 15 and a zero value) or end of block.
    uint32_t zeros = 0;
    if (!dc) zeros = run == 15 ? 15 : kEndOfBlock;
    std::fill_n(entries, size_t{1} << free_bits, make_entry(0, zeros, length));
  } else if (size <= free_bits) {
    const int rest = free_bits - size;
    for (uint32_t bits = 0; bits < 1u << size; ++bits) {
      const uint32_t entry = make_entry(extend(bits, size), run, length + size);
      std::fill_n(entries + (bits << rest), size_t{1} << rest, entry);
    }
  } else {
    std::fill_n(entries, size_t{1} << free_bits, make_entry(size, run, length | kSlowFlag));
  }
}

}  // namespace

void HuffmanTable::build_skip() {
  constexpr uint32_t kMask = (1u << kSkipBits) - 1;
  for (uint32_t bits = 0; bits <= kMask; ++bits) {
    uint32_t used = 0;
    uint32_t coefficients = 0;
    bool block_ends = false;
    while (!block_ends) {
      // Unknown bits are zero here; an entry that needs one of them is longer than what is left.
      const uint32_t ahead = bits << used & kMask;
      const uint32_t entry = lookup[ahead >> (kSkipBits - kLookupBits)];
      const uint32_t length = entry & 31;
      const uint32_t run = entry >> 8 & 255;
      if (entry & kSlowFlag || used + length > kSkipBits) break;
      used += length;
      block_ends = run == kEndOfBlock;
      if (!block_ends) coefficients += run + 1;
    }
    skip[bits] = static_cast<uint16_t>(used | coefficients << 4 | uint32_t{block_ends} << 11);
  }
}

bool HuffmanTable::build(const uint8_t* from, size_t size, bool dc) {
  // Most files of a data set share their tables: that of the last image is usually this one.
  if (valid && std::memcmp(definition, from, size) == 0) return true;
  valid = false;
  std::fill(lookup, lookup + (1 << kLookupBits), kSlowFlag);
  std::memset(definition, 0, sizeof definition);
  std::memcpy(definition, from, size);
  std::memcpy(huffval, definition + 16, sizeof huffval);

  // T.81, C.2: codes of one length count up; the first of the next length continues, with a bit
  // more.
  uint32_t code = 0;
  int index = 0;
  for (int length = 1; length <= 16; ++length) {
    const int count = from[length - 1];
    value_offset[length] = index - static_cast<int32_t>(code);
    for (int i = 0; i < count; ++i) {
      if (code >= 1u << length) return false;
      if (dc && huffval[index] > 15) return false;
      if (length <= kLookupBits) add_code(lookup, code, length, huffval[index], dc);
      ++index;
      ++code;
    }
    if (count && code >= 1u << length) return false;  // the code of all ones is reserved
    code_end[length] = static_cast<int32_t>(code << (16 - length));
    code <<= 1;
  }
  code_end[17] = INT32_MAX;
  if (!dc) build_skip();
  valid = true;
  return true;
}

}  // namespace matryoshka
