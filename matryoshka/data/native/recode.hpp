// Moves the restart markers of a baseline JPEG without decoding its coefficients: the bits of all
// blocks are copied; only the DC difference of the first block behind a marker is coded anew.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bytes.hpp"
#include "huffman.hpp"
#include "tiles.hpp"

namespace matryoshka {

// Huffman codes for DC differences, by the number of their bits (SSSS).
struct DcCodes {
  static constexpr int kSizes = 12;  // baseline differences have up to 11 bits (T.81, table F.1)
  uint16_t code[kSizes];
  uint8_t length[kSizes];  // 0: this size has no code
};

// Writes entropy-coded data, 32 bits at a time, with byte stuffing.
struct BitWriter {
  uint8_t* next;
  uint64_t bits;  // the last `count` bits, fewer than 32, are still to be written
  int count;
};

// MCUs [first, last), one segment of the source, for recode_blocks.
struct RecodeJob {
  struct Component {
    int h, v;  // sampling factors
    const HuffmanTable *dc, *ac;
    const DcCodes* codes;
    int32_t dc_pred, out_dc_pred;  // the last block's DC coefficient, for the source and the result
  };
  const uint8_t* data;  // unstuffed; kSegmentPadding bytes are readable behind the end
  size_t size;
  int components;
  Component component[3];
  int64_t first, last;
  bool complete;             // another segment follows; else the result ends here
  int64_t restart_interval;  // of the result
  bool rewrite_all_dc;       // the result has different DC codes
  BitWriter out;
};

class Recoder {
 public:
  // Write the same coefficients with a restart marker every `interval` MCUs (0: none). `tiles` has
  // parsed the JPEG. False for unusual files and for damage, which libjpeg may still tolerate.
  bool recode(Tiles& tiles, Bytes jpeg, unsigned interval);
  Bytes result() const { return {result_.data(), size_}; }

 private:
  bool build_tables(const Frame& frame);
  void write_header(const Tiles& tiles, Bytes jpeg, unsigned interval);

  HuffmanTable tables_[2][4] = {};  // DC, AC
  DcCodes codes_[4] = {};
  RecodeJob job_{};
  std::vector<uint8_t> result_;
  size_t size_ = 0;
};

}  // namespace matryoshka
