// Resampling weights of one axis: area averaging where it shrinks, bilinear interpolation
// (half-pixel centres, clamped to the crop) where it grows, a copy where the size stays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "image_kernels.hpp"

namespace matryoshka {

class Taps {
 public:
  // The source samples of one output sample: [start, start + count).
  struct Span {
    int32_t start, count;
    size_t weights;  // index of the first tap's weight
  };

  // Weights for `target` samples from the pixels [start, start + length) of an axis with one sample
  // for `subsampling` pixels; all at least 1. Spans count from the first sample that is in the
  // crop, if only in part.
  void compute(int64_t start, int64_t length, int64_t subsampling, int target);
  // The same for column_filter(): mirrored for a flip; all spans equally long, with zero weights;
  // the last column repeated up to a multiple of 8.
  void compute_columns(int64_t start, int64_t length, int64_t subsampling, int target, bool mirror);

  int size() const { return static_cast<int>(spans_.size()); }
  int source_size() const { return source_size_; }
  int max_taps() const { return max_taps_; }
  const Span& operator[](int i) const { return spans_[i]; }
  const uint16_t* weights(int i) const { return weights_.data() + spans_[i].weights; }
  ColumnFilter column_filter() const { return {starts_.data(), paired_.data(), max_taps_}; }

 private:
  void add_area(int64_t begin, int64_t length, int64_t unit);
  void add_bilinear(int64_t centre, int64_t unit);
  void add_weight(int64_t weight);

  std::vector<Span> spans_;
  std::vector<uint16_t> weights_;
  std::vector<int32_t> starts_;
  std::vector<uint32_t> paired_;  // each weight twice in 32 bits
  int source_size_ = 0, max_taps_ = 0;
};

}  // namespace matryoshka
