// Which source samples an output sample is made of: area averaging where an axis shrinks, bilinear
// interpolation (half-pixel centres, clamped to the crop) where it grows, a copy where the size
// stays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "image_kernels.hpp"

namespace matryoshka {

class Taps {
 public:
  struct Span {
    int32_t start, count;
    size_t weights;  // of the first tap, in the array below
  };

  // `target` samples from the pixels [start, start + length) of an axis that has one sample for
  // `sub` pixels; all at least 1. Spans count from the first sample that lies in the crop, even if
  // only in part.
  void compute(int64_t start, int64_t length, int64_t sub, int target);
  // The same as columns(): mirrored for a flip, all runs equally long by zero weights, the last
  // column repeated up to a multiple of 8.
  void compute_columns(int64_t start, int64_t length, int64_t sub, int target, bool mirror);

  int size() const { return static_cast<int>(spans_.size()); }
  int samples() const { return samples_; }
  int longest() const { return longest_; }
  const Span& operator[](int i) const { return spans_[i]; }
  const uint16_t* weights(int i) const { return weights_.data() + spans_[i].weights; }
  Columns columns() const { return {starts_.data(), even_.data(), longest_}; }

 private:
  std::vector<Span> spans_;
  std::vector<uint16_t> weights_;
  std::vector<int32_t> starts_;
  std::vector<uint32_t> even_;
  int samples_ = 0, longest_ = 0;
};

}  // namespace matryoshka
