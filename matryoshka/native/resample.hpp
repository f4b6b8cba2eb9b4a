// Resizes an RGB crop while its rows stream in: area averaging on an axis that shrinks, bilinear interpolation
// (half-pixel centres, clamped edges) on an axis that grows, a copy where the size stays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace matryoshka {

// For every output pixel of one axis: the run of source pixels it is made of, and their weights in 1/65536.
class Taps {
 public:
  struct Span {
    int32_t start, count;
    size_t weights;  // of the first tap, in the array below
  };

  void compute(int source, int target);
  // The same, mirrored for a flip, with zero weights added until all runs are equally long. The even weights are
  // 32 bits wide because a vector unit spreads such a number over its lanes while it loads it.
  void compute_even(int source, int target, bool mirror);

  int size() const { return static_cast<int>(spans_.size()); }
  const Span* spans() const { return spans_.data(); }
  const uint16_t* weights() const { return weights_.data(); }
  const uint32_t* even_weights() const { return even_weights_.data(); }

 private:
  std::vector<Span> spans_;
  std::vector<uint16_t> weights_;
  std::vector<uint32_t> even_weights_;
};

// Keeps its memory from one image to the next: a few rows and two tables.
class Resampler {
 public:
  // All sizes are at least 1; out is [out_height, out_width, 3].
  void begin(int crop_width, int crop_height, bool flip, uint8_t* out, int out_height, int out_width);

  // Takes the crop's next row of 3 * crop_width bytes, which has to stay readable until the next call returns:
  // bilinear interpolation looks back one row. The last row completes the output.
  void push(const uint8_t* row);

 private:
  void add(const uint8_t* row, const Taps::Span& span, int tap);
  void emit();

  Taps rows_, columns_;
  std::vector<uint16_t> sum_;       // one row in 8.8 fixed point
  std::vector<uint32_t> wide_sum_;  // one row in 8.16, for long runs of taps
  size_t row_bytes_ = 0;
  const uint8_t* previous_ = nullptr;
  int next_row_ = 0, next_out_ = 0;
  bool enlarge_rows_ = false;
  uint8_t* out_ = nullptr;
};

}  // namespace matryoshka
