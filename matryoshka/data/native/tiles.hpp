// Restart markers cut a JPEG's entropy-coded data into segments that decode on their own. The
// segments that a crop touches, behind a header with a smaller size, are a small JPEG with the same
// pixels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bytes.hpp"
#include "crop.hpp"

namespace matryoshka {

// What has to be known of a baseline JPEG with one scan and 1 or 3 components to find its blocks.
struct Frame {
  struct Component {
    int id, h, v;         // h, v: sampling factors
    int factors, dc, ac;  // numbers of tables
  };
  int width, height, components;
  Component component[3];
  int max_h, max_v;
  int mcu_width, mcu_height;  // in pixels
  int columns, rows;          // of MCUs
  int interval;               // MCUs between restart markers, 0: none
  bool plain;                 // the scan has nothing unusual, the colours are YCbCr or grey
  Bytes huffman[2][4];  // definitions: 16 counts, symbols; of DC and AC; null where there is none
  Bytes factors[4];     // of dequantisation: 64 numbers of 1 or 2 bytes
  size_t size_at;       // where height and width stand
  size_t scan;          // where the entropy-coded data begins
};

// Segments of the header, marker included: only what decides about pixels.
struct HeaderPart {
  size_t begin, end;
};

class Tiles {
 public:
  // False for any other kind of JPEG, and where the header breaks off or makes no sense.
  bool parse(Bytes jpeg);
  const Frame& frame() const { return frame_; }

  // After parse. True where it pays to decode stream() instead; false also where markers are
  // missing or out of order. The stream's top left pixel is the whole image's pixel (x, y).
  bool splice(const Crop& crop);
  int x() const { return x_; }
  int y() const { return y_; }
  // After parse: looks for all segments up to number `last` and for the end of that one. False
  // where markers are missing or out of order.
  bool find_segments(size_t last);
  Bytes segment(size_t k) const;
  // Its entropy-coded data without the zeros behind each 0xFF, until the next call; kSegmentPadding
  // zeros follow.
  Bytes unstuffed(size_t k);
  const std::vector<HeaderPart>& header() const { return header_; }

  Bytes stream() const { return {stream_.data(), stream_.size()}; }
  // Where a decoder of the whole stream has to arrive.
  const uint8_t* data_end() const { return stream_.data() + data_end_; }

 private:
  void write_header(int width, int height);

  Bytes jpeg_{};
  Frame frame_{};
  std::vector<HeaderPart> header_;
  std::vector<size_t> segments_;  // where each begins; its marker stands in the two bytes before
  size_t last_end_ = 0;           // of the last segment looked for
  std::vector<uint8_t> stream_, unstuffed_;
  size_t data_end_ = 0;
  int x_ = 0, y_ = 0;
};

}  // namespace matryoshka
