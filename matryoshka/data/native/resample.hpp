// Resizes an RGB crop while its rows stream in, or a crop that lies in planes of luma and chroma.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "crop.hpp"
#include "image.hpp"
#include "taps.hpp"

namespace matryoshka {

// Output rows wait here until kBatch of them can be turned and mixed together. Keeps its memory.
class Batch {
 public:
  void begin(Image out);
  // One row of `n` sums for plane `p`, to be filled by the caller.
  uint16_t* sums(int p, size_t n);
  // The row is complete in all planes. True when the batch is full.
  bool next() { return ++rows_ == kBatch; }
  int rows() const { return rows_; }
  const uint16_t* turned(int p, size_t n);
  const uint16_t* row(int p, int i) const { return sums_[p].data() + i * stride_[p]; }
  // Where the kernels write 16 rows of whole groups of 8 pixels; finish() brings what belongs there
  // into the image.
  uint8_t* const* targets();
  void finish();
  void leave();  // instead: the caller has written image_row(0) to image_row(rows() - 1)
  uint8_t* image_row(int i) const {
    return out_.pixels + static_cast<size_t>(done_ + i) * 3 * out_.width;
  }

 private:
  std::vector<uint16_t> sums_[3], lanes_[3];
  size_t stride_[3] = {};
  std::vector<uint8_t> stage_;
  uint8_t* targets_[kBatch] = {};
  Image out_{};
  int rows_ = 0, done_ = 0;
};

class Resampler {
 public:
  // The crop has at least one pixel; the rows have one for `sub` of its pixels, on either axis.
  void begin(const Crop& crop, int sub, Image out);

  // Takes the next row that lies in the crop, if only in part, from the first pixel that does. It
  // has to stay readable until `window()` more rows have been pushed. The last row completes the
  // output.
  void push(const uint8_t* row);
  int window() const { return window_; }

 private:
  void add_wide(const uint8_t* row, int tap);
  void emit();

  Taps rows_, columns_;
  Batch batch_;
  std::vector<const uint8_t*> recent_;  // the last window_ rows, row y at y % window_
  std::vector<uint32_t> wide_sum_;      // one row in 8.16, for long runs of taps
  size_t row_bytes_ = 0;
  int window_ = 0, next_row_ = 0, next_out_ = 0;
};

class PlaneResampler {
 public:
  // Planes of YCbCr, the two of chroma alike, or one of grey. False, without a result, for a
  // reduction so strong that it needs the other class.
  bool resample(const PlaneView* planes, int count, const Crop& crop, Image out);

 private:
  Taps rows_[2], columns_[2];  // luma, chroma
  Batch batch_;
};

}  // namespace matryoshka
