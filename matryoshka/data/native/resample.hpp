// Resizing of a crop: of RGB rows that stream in, or of planes of luma and chroma.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "crop.hpp"
#include "image.hpp"
#include "taps.hpp"

namespace matryoshka {

// Collects the vertical filter's output until kBatchRows rows can be transposed and filtered
// horizontally. Keeps its memory from image to image.
class RowBatch {
 public:
  void begin(Image out);
  // The current row of plane p: `n` numbers for the caller to fill.
  uint16_t* current_row(int p, size_t n);
  // The current row is complete in all planes. True when the batch is full.
  bool next() { return ++rows_ == kBatchRows; }
  int rows() const { return rows_; }
  const uint16_t* row(int p, int i) const { return rows_of_[p].data() + i * stride_[p]; }
  const uint16_t* transposed(int p, size_t n);

  // Where the horizontal filter writes kBatchRows rows of whole groups of 8 pixels; finish() then
  // copies what belongs to the image, if the rows are not in it already.
  uint8_t* const* output_rows();
  void finish();
  // Instead of both: the caller has written image_row(0) to image_row(rows() - 1).
  void finish_in_place();
  uint8_t* image_row(int i) const {
    return out_.pixels + static_cast<size_t>(done_ + i) * 3 * out_.width;
  }

 private:
  std::vector<uint16_t> rows_of_[3], columns_[3];  // of each plane
  size_t stride_[3] = {};
  std::vector<uint8_t> staging_;
  uint8_t* output_rows_[kBatchRows] = {};
  Image out_{};
  int rows_ = 0, done_ = 0;
};

class Resampler {
 public:
  // Prepare for rows with one pixel for `subsampling` pixels of the crop, on either axis. The crop
  // has at least one pixel.
  void begin(const Crop& crop, int subsampling, Image out);

  // Take the next row that is in the crop, if only in part, from its first such pixel on. It must
  // stay readable until window() more rows have been pushed. The last row completes the output.
  void push(const uint8_t* row);
  int window() const { return window_; }

 private:
  bool many_taps() const { return rows_.max_taps() > kMaxNarrowTaps; }
  void push_narrow();
  void push_wide(const uint8_t* row);
  void add_wide(const uint8_t* row, int tap);
  void finish_row();

  Taps rows_, columns_;
  RowBatch batch_;
  std::vector<const uint8_t*> recent_;  // the last window_ rows, row y at y % window_
  std::vector<uint32_t> wide_sum_;      // one row in 8.16, for more than kMaxNarrowTaps taps
  size_t row_bytes_ = 0;
  int window_ = 0, next_row_ = 0, next_out_ = 0;
};

class PlaneResampler {
 public:
  // Resample planes Y, Cb, Cr (the two of chroma alike), or one of grey. False, without a result,
  // for more than kMaxNarrowTaps taps: Resampler can do that.
  bool resample(const PlaneView* planes, int count, const Crop& crop, Image out);

 private:
  Taps rows_[2], columns_[2];  // luma, chroma
  RowBatch batch_;
};

}  // namespace matryoshka
