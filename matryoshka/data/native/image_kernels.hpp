// The innermost loops of image decoding and resampling, compiled for several kinds of CPU and
// chosen at run time. The arithmetic is integer: every version gives the same pixels.
//
// Resampling works on 16 output rows at a time. The vertical filter makes 16 rows of 8.8 fixed
// point; these are transposed so that one vector holds one column of 16 rows; the horizontal filter
// then adds weighted columns as the vertical one added rows.
#pragma once

#include <cstddef>
#include <cstdint>

namespace matryoshka {

struct CompareJob;
struct DecodeJob;
struct RecodeJob;

constexpr int kBatchRows = 16;
// Products are truncated to 16 bits: up to this many taps the error stays below 1/8 grey level.
constexpr int kMaxNarrowTaps = 64;

// The horizontal filter. For every output column: its first source column and `taps` weights in
// 1/65536. Each weight is there twice, in the halves of 32 bits: a vector unit repeats a 32-bit
// number over its lanes while loading it, but not a 16-bit one.
struct ColumnFilter {
  const int32_t* starts;
  const uint32_t* weights;
  int taps;
};

struct Kernels {
  // sum[i] = the weighted sum of rows[k][i], k < count, in 8.8 fixed point, for i < n.
  void (*filter_vertical)(uint16_t* sum, const uint8_t* const* rows, const uint16_t* weights,
                          int count, size_t n);
  // kBatchRows rows, `stride` apart -> [n][kBatchRows]. n is a multiple of 8.
  void (*transpose)(uint16_t* columns, const uint16_t* rows, size_t stride, size_t n);
  // Transposed columns of interleaved RGB -> kBatchRows rows of `width` RGB pixels. width is a
  // multiple of 8.
  void (*filter_horizontal)(uint8_t* const* out, const uint16_t* columns,
                            const ColumnFilter& filter, int width);
  // The same from transposed columns of Y, Cb, Cr, with conversion to RGB. Without chroma (null):
  // grey.
  void (*filter_horizontal_ycc)(uint8_t* const* out, const uint16_t* const columns[3],
                                const ColumnFilter& luma, const ColumnFilter& chroma, int width);
  // Entropy decoding and inverse DCT of a run of MCUs (entropy.hpp). False for damage.
  bool (*decode_blocks)(DecodeJob& job);
  // Whether two JPEGs have the same coefficients in a run of MCUs (entropy.hpp). False for damage.
  bool (*equal_blocks)(CompareJob& job);
  // Entropy-coded MCUs with different restart markers (recode.hpp). False for damage.
  bool (*recode_blocks)(RecodeJob& job);
};

// The fastest kernels that this CPU can run.
const Kernels& kernels();

extern const Kernels kPortableKernels, kAvx2Kernels;

}  // namespace matryoshka
