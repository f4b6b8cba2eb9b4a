// Moves the restart markers of a baseline JPEG without decoding it: the bits of all blocks are
// copied, only the DC difference of the first block behind a marker is coded anew. What the kernel
// works on, see entropy.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bytes.hpp"
#include "huffman.hpp"
#include "tiles.hpp"

namespace matryoshka {

struct DcCodes {
  static constexpr int kSizes = 12;  // of differences in baseline JPEG: up to 2047
  uint16_t code[kSizes];
  uint8_t length[kSizes];  // 0: there is none
};

// Entropy-coded data: 32 bits at a time, with a zero behind every 0xFF.
struct BitWriter {
  uint8_t* next;
  uint64_t bits;  // the last `count` of them, fewer than 32, are still to be written
  int count;
};

// The work of recode_blocks: MCUs [first, last), one segment of the source.
struct RecodeScan {
  struct Component {
    int h, v;
    const HuffmanTable *dc, *ac;
    const DcCodes* codes;
    int32_t prediction, written;  // mean of the last block, as the source and as the result count
  };
  const uint8_t* data;  // without stuffed zeros; kSegmentPadding bytes are readable behind the end
  size_t size;
  int components;
  Component component[3];
  int64_t first, last;
  bool complete;     // another segment follows, else the result ends here
  int64_t interval;  // MCUs between the new markers
  bool all_dc;       // the DC codes are new, too
  BitWriter out;
};

class Recoder {
 public:
  // The same coefficients with restart markers every `interval` MCUs (0: none), where `tiles` has
  // parsed a stream of the usual kind. False for others and for damage, which libjpeg may still
  // make sense of.
  bool recode(Tiles& tiles, Bytes jpeg, unsigned interval);
  Bytes result() const { return {result_.data(), size_}; }

 private:
  bool define_tables(const Frame& frame);
  void write_header(const Tiles& tiles, Bytes jpeg, unsigned interval);

  HuffmanTable tables_[2][4] = {};
  DcCodes codes_[4] = {};
  RecodeScan scan_{};
  std::vector<uint8_t> result_;
  size_t size_ = 0;
};

}  // namespace matryoshka
