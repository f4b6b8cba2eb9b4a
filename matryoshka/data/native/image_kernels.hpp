// The innermost loops, compiled for several kinds of CPU; the arithmetic is integer, every version
// gives the same pixels. Resampling works on 16 output rows at a time: first the rows are blended
// into 16 rows of 8.8 fixed point, then these are turned so that one vector holds one column, and
// columns are blended like rows before.
#pragma once

#include <cstddef>
#include <cstdint>

namespace matryoshka {

struct BlockScan;
struct RecodeScan;

constexpr int kBatch = 16;  // rows resampled together
constexpr int kMaxNarrowTaps =
    64;  // up to here the truncation of 16-bit products stays below 1/8 grey level

// For every output column: its first source column, and `taps` weights in 1/65536, each given twice
// in 32 bits because a vector unit spreads such a number over its lanes while it loads it.
struct Columns {
  const int32_t* starts;
  const uint32_t* weights;
  int taps;
};

struct Kernels {
  // sum[i] = the blend of rows[k][i] in 8.8 fixed point.
  void (*blend_rows)(uint16_t* sum, const uint8_t* const* rows, const uint16_t* weights, int count,
                     size_t n);
  // n is a multiple of 8.
  void (*turn)(uint16_t* lanes, const uint16_t* sums, size_t stride, size_t n);
  // Interleaved RGB columns -> 16 rows of `width` RGB pixels, a multiple of 8.
  void (*mix_rgb)(uint8_t* const* out, const uint16_t* lanes, const Columns& columns, int width);
  // Y, Cb, Cr columns of different sizes -> the same. Without chroma (null): grey.
  void (*mix_planes)(uint8_t* const* out, const uint16_t* const lanes[3], const Columns& luma,
                     const Columns& chroma, int width);
  // Entropy decoding and inverse DCT of a run of MCUs, see entropy.hpp. False for damage.
  bool (*decode_blocks)(BlockScan& scan);
  // Entropy-coded MCUs with other restart markers, see recode.hpp. False for damage.
  bool (*recode_blocks)(RecodeScan& scan);
};

const Kernels& kernels();

extern const Kernels kBaselineKernels, kAvx2Kernels;

}  // namespace matryoshka
