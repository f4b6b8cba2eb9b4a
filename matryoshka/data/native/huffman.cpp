#include "huffman.hpp"

#include <algorithm>
#include <cstring>

namespace matryoshka {
namespace {

int32_t extended(uint32_t bits, int size) {  // JPEG's signed numbers
  return size && bits < (1u << (size - 1)) ? static_cast<int32_t>(bits) - (1 << size) + 1
                                           : static_cast<int32_t>(bits);
}

uint32_t packed(int32_t high, uint32_t run, uint32_t low) {
  return static_cast<uint32_t>(high) << 16 | run << 8 | low;
}

void add(uint32_t* fast, uint32_t code, int length, uint8_t symbol, bool dc) {
  const int size = symbol & 15, room = kFastBits - length;
  const uint32_t run = dc ? 0 : symbol >> 4;
  uint32_t* entries = fast + (code << room);
  if (size == 0) {
    const uint32_t zeros = dc ? 0 : run == 15 ? 15 : kEndOfBlock;
    std::fill_n(entries, size_t{1} << room, packed(0, zeros, length));
  } else if (size <= room) {
    for (uint32_t bits = 0; bits < 1u << size; ++bits)
      std::fill_n(entries + (bits << (room - size)), size_t{1} << (room - size),
                  packed(extended(bits, size), run, length + size));
  } else {
    std::fill_n(entries, size_t{1} << room, packed(size, run, length | kSlow));
  }
}

}  // namespace

void HuffmanTable::define_skips() {
  for (uint32_t bits = 0; bits < 1u << kSkipBits; ++bits) {
    uint32_t used = 0, passed = 0, end = 0;
    while (!end) {
      const uint32_t ahead =
          bits << used & ((1u << kSkipBits) - 1);  // zeros stand for what is not known
      const uint32_t entry = fast[ahead >> (kSkipBits - kFastBits)], length = entry & 31,
                     run = entry >> 8 & 255;
      if (entry & kSlow || used + length > kSkipBits) break;
      used += length;
      end = run == kEndOfBlock;
      passed += end ? 0 : run + 1;
    }
    skip[bits] = static_cast<uint16_t>(used | passed << 4 | end << 11);
  }
}

bool HuffmanTable::define(const uint8_t* from, size_t size, bool dc) {
  if (valid && std::memcmp(definition, from, size) == 0)
    return true;  // usually that of the last image
  valid = false;
  std::fill(fast, fast + (1 << kFastBits), kSlow);
  std::memset(definition, 0, sizeof definition);
  std::memcpy(definition, from, size);
  std::memcpy(symbols, definition + 16, sizeof symbols);
  uint32_t code = 0;
  int index = 0;
  for (int length = 1; length <= 16; ++length, code <<= 1) {
    const int count = from[length - 1];
    offset[length] = index - static_cast<int32_t>(code);
    for (int i = 0; i < count; ++i, ++index, ++code) {
      if (code >= 1u << length) return false;
      if (dc && symbols[index] > 15) return false;
      if (length <= kFastBits) add(fast, code, length, symbols[index], dc);
    }
    if (count && code >= 1u << length) return false;                  // all ones is no code
    last_code[length] = static_cast<int32_t>(code << (16 - length));  // the first that is longer
  }
  last_code[17] = INT32_MAX;
  if (!dc) define_skips();
  valid = true;
  return true;
}

}  // namespace matryoshka
