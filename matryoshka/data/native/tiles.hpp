// Tiles of a JPEG: restart markers cut the entropy-coded data into segments that decode on their
// own. The segments that a crop touches, behind a header with a smaller size, are a valid small
// JPEG with the same pixels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "bytes.hpp"
#include "crop.hpp"

namespace matryoshka {

// The header of a baseline JPEG with one scan and 1 or 3 components.
struct Frame {
  struct Component {
    int id;
    int h, v;         // sampling factors
    int quant_table;  // destinations (numbers) of its tables
    int dc_table, ac_table;
  };
  int width, height, components;
  Component component[3];
  int max_h, max_v;           // sampling factors
  int mcu_width, mcu_height;  // in pixels
  int mcus_per_row, mcu_rows;
  int restart_interval;        // MCUs between restart markers; 0: no markers
  bool ordinary;               // baseline scan parameters, and YCbCr or grey
  Bytes huffman_tables[2][4];  // DC, AC: the BITS and HUFFVAL lists; null where undefined
  Bytes quant_tables[4];       // 64 numbers of 1 or 2 bytes; null where undefined
  size_t size_offset;          // where height and width are in the file
  size_t entropy_begin;        // where the entropy-coded data begins

  // A scan of one component is not interleaved: its MCU is one block (T.81, A.2.2).
  bool interleaved() const { return components > 1; }
};

// A header segment that decides about pixels, with its marker: bytes [begin, end) of the file.
struct HeaderPart {
  size_t begin, end;
};

class Tiles {
 public:
  // Read the header. False for other kinds of JPEG and for a damaged header.
  bool parse(Bytes jpeg);
  const Frame& frame() const { return frame_; }
  const std::vector<HeaderPart>& header() const { return header_; }

  // After parse: find segments 0 .. last and the end of the last one. False where markers are
  // missing or out of order.
  bool find_segments(size_t last);
  Bytes segment(size_t k) const;
  // Its data without byte stuffing (the zero behind each 0xFF), valid until the next call;
  // kSegmentPadding zeros follow.
  Bytes unstuffed(size_t k);

  // After parse: build stream(), a JPEG of the tiles that the crop touches. Its top left pixel is
  // pixel (x, y) of the image. False where that saves nothing, and where markers are missing or out
  // of order.
  bool splice(const Crop& crop);
  int x() const { return x_; }
  int y() const { return y_; }
  Bytes stream() const { return {stream_.data(), stream_.size()}; }
  // The end of the stream's entropy-coded data: a decoder must read up to here.
  const uint8_t* data_end() const { return stream_.data() + data_end_; }

 private:
  void write_header(int width, int height);
  void copy_segments(size_t first, size_t last);
  void write_restart_marker();

  Bytes jpeg_{};
  Frame frame_{};
  std::vector<HeaderPart> header_;
  std::vector<size_t> segments_;  // where each begins; the marker is in the two bytes before
  size_t last_end_ = 0;           // end of the last segment that was searched for
  std::vector<uint8_t> stream_, unstuffed_;
  int64_t num_restarts_ = 0;  // written to stream_
  size_t data_end_ = 0;
  int x_ = 0, y_ = 0;
};

}  // namespace matryoshka
