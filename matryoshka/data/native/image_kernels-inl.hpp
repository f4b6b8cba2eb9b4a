// The kernels of image_kernels.hpp. Each kind of CPU has a file that includes this one, with
// MATRYOSHKA_KERNELS as the name of its table.
#pragma once

#include "entropy-inl.hpp"
#include "image_kernels.hpp"
#include "lanes.hpp"
#include "recode-inl.hpp"

namespace matryoshka {
namespace {

// ---- vertical filter ----

// Add kTaps weighted rows to `sum`, or to the bias for the first ones. mulhi truncates every
// product, by half a unit on average: the bias of half a unit per tap makes up for it.
template <int kTaps>
inline void add_rows(uint16_t* __restrict sum, const uint8_t* const* rows, const uint16_t* weights,
                     size_t n, uint16_t bias, bool first) {
  Lanes weight[kTaps];
  const uint8_t* row[kTaps];
  for (int k = 0; k < kTaps; ++k) {
    weight[k] = broadcast(weights[k]);
    row[k] = rows[k];
  }
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Lanes total = first ? broadcast(bias) : load(sum + i);
    for (int k = 0; k < kTaps; ++k) total = total + mulhi(load_bytes_high(row[k] + i), weight[k]);
    store(sum + i, total);
  }
  for (; i < n; ++i) {
    uint32_t total = first ? bias : sum[i];
    for (int k = 0; k < kTaps; ++k) {
      total += (static_cast<uint32_t>(row[k][i] << 8) * weights[k]) >> 16;
    }
    sum[i] = static_cast<uint16_t>(total);
  }
}

void filter_vertical(uint16_t* sum, const uint8_t* const* rows, const uint16_t* weights, int count,
                     size_t n) {
  const uint16_t bias = static_cast<uint16_t>(count / 2);
  for (int k = 0; k < count; k += 4) {  // four rows in a pass over the sums
    const bool first = k == 0;
    switch (count - k) {
      case 1: add_rows<1>(sum, rows + k, weights + k, n, bias, first); break;
      case 2: add_rows<2>(sum, rows + k, weights + k, n, bias, first); break;
      case 3: add_rows<3>(sum, rows + k, weights + k, n, bias, first); break;
      default: add_rows<4>(sum, rows + k, weights + k, n, bias, first);
    }
  }
}

void transpose(uint16_t* columns, const uint16_t* rows, size_t stride, size_t n) {
  for (size_t i = 0; i < n; i += 8) transpose_16x8(columns + i * kLanes, rows + i, stride);
}

// ---- horizontal filter ----

// The weighted sum of neighbouring columns in 8.8. kStep: numbers from one column of a channel to
// the next. kTaps: the number of taps where it is known at compile time, else 0.
template <int kTaps, int kStep>
inline Lanes weighted_sum(const uint16_t* columns, const uint32_t* weights, int taps, Lanes bias) {
  if (kTaps) taps = kTaps;
  Lanes total = bias;
  for (int k = 0; k < taps; ++k) {
    total = total + mulhi(load(columns + k * (kStep * kLanes)), broadcast_pair(weights + k));
  }
  return total;
}

// Write 8 RGB pixels, 24 columns, to each of 16 rows.
inline void store_pixels(uint8_t* const* out, int x, const PackedBytes columns[24]) {
  for (int part = 0; part < 3; ++part) {
    store_transposed(out, 3 * static_cast<size_t>(x) + 8 * part, columns + 8 * part);
  }
}

template <int kTaps>
inline void filter_horizontal_taps(uint8_t* const* out, const uint16_t* columns,
                                   const ColumnFilter& filter, int width) {
  const int taps = kTaps ? kTaps : filter.taps;
  // Half a grey level, for rounding, and half a unit per truncated product.
  const Lanes bias = broadcast(static_cast<uint16_t>(128 + taps / 2));
  const uint32_t* weights = filter.weights;
  for (int x = 0; x < width; x += 8) {
    PackedBytes pixels[24];
    for (int i = 0; i < 8; ++i, weights += taps) {
      const uint16_t* first = columns + static_cast<size_t>(filter.starts[x + i]) * (3 * kLanes);
      for (int c = 0; c < 3; ++c) {
        const Lanes sum = weighted_sum<kTaps, 3>(first + c * kLanes, weights, taps, bias);
        pixels[3 * i + c] = pack_saturated(shift_right<8>(sum));
      }
    }
    store_pixels(out, x, pixels);
  }
}

void filter_horizontal(uint8_t* const* out, const uint16_t* columns, const ColumnFilter& filter,
                       int width) {
  switch (filter.taps) {
    case 1: return filter_horizontal_taps<1>(out, columns, filter, width);
    case 2: return filter_horizontal_taps<2>(out, columns, filter, width);
    case 3: return filter_horizontal_taps<3>(out, columns, filter, width);
    case 4: return filter_horizontal_taps<4>(out, columns, filter, width);
    default: return filter_horizontal_taps<0>(out, columns, filter, width);
  }
}

// ---- horizontal filter with conversion from YCbCr ----

template <int kLuma, int kChroma>
inline void filter_ycc_taps(uint8_t* const* out, const uint16_t* const columns[3],
                            const ColumnFilter& luma, const ColumnFilter& chroma, int width) {
  const int luma_taps = kLuma ? kLuma : luma.taps;
  const int chroma_taps = kChroma ? kChroma : chroma.taps;
  const Lanes luma_bias = broadcast(static_cast<uint16_t>(luma_taps / 2));
  const Lanes chroma_bias = broadcast(static_cast<uint16_t>(chroma_taps / 2));
  // JFIF's 1.402, 0.344136, 0.714136 and 1.772 in 1/16384: mulhi of an 8.8 number gives 8.6.
  const Lanes cr_to_red = broadcast(22970);
  const Lanes cb_to_green = broadcast(5638);
  const Lanes cr_to_green = broadcast(11700);
  const Lanes cb_to_blue = broadcast(29032);
  const Lanes centre = broadcast(0x8000);  // flipping this bit subtracts 128 from an 8.8 number
  const Lanes half = broadcast(32);        // in 8.6
  const uint32_t* luma_weights = luma.weights;
  const uint32_t* chroma_weights = chroma.weights;
  for (int x = 0; x < width; x += 8) {
    PackedBytes pixels[24];
    for (int i = 0; i < 8; ++i) {
      const uint16_t* y_first = columns[0] + static_cast<size_t>(luma.starts[x + i]) * kLanes;
      const size_t at = static_cast<size_t>(chroma.starts[x + i]) * kLanes;
      const Lanes y_sum = weighted_sum<kLuma, 1>(y_first, luma_weights, luma_taps, luma_bias);
      const Lanes cb_sum =
          weighted_sum<kChroma, 1>(columns[1] + at, chroma_weights, chroma_taps, chroma_bias);
      const Lanes cr_sum =
          weighted_sum<kChroma, 1>(columns[2] + at, chroma_weights, chroma_taps, chroma_bias);

      const Lanes y = shift_right<2>(y_sum) + half;
      const Lanes cb = cb_sum ^ centre;
      const Lanes cr = cr_sum ^ centre;
      const Lanes red = y + mulhi_signed(cr, cr_to_red);
      const Lanes green = y - mulhi_signed(cb, cb_to_green) - mulhi_signed(cr, cr_to_green);
      const Lanes blue = y + mulhi_signed(cb, cb_to_blue);
      pixels[3 * i] = pack_saturated(shift_right_signed<6>(red));
      pixels[3 * i + 1] = pack_saturated(shift_right_signed<6>(green));
      pixels[3 * i + 2] = pack_saturated(shift_right_signed<6>(blue));
      luma_weights += luma_taps;
      chroma_weights += chroma_taps;
    }
    store_pixels(out, x, pixels);
  }
}

void filter_horizontal_grey(uint8_t* const* out, const uint16_t* columns,
                            const ColumnFilter& filter, int width) {
  const Lanes bias = broadcast(static_cast<uint16_t>(128 + filter.taps / 2));
  const uint32_t* weights = filter.weights;
  for (int x = 0; x < width; x += 8) {
    PackedBytes pixels[24];
    for (int i = 0; i < 8; ++i, weights += filter.taps) {
      const uint16_t* first = columns + static_cast<size_t>(filter.starts[x + i]) * kLanes;
      const Lanes sum = weighted_sum<0, 1>(first, weights, filter.taps, bias);
      const PackedBytes grey = pack_saturated(shift_right<8>(sum));
      for (int c = 0; c < 3; ++c) pixels[3 * i + c] = grey;
    }
    store_pixels(out, x, pixels);
  }
}

template <int kLuma>
inline void filter_ycc_luma(uint8_t* const* out, const uint16_t* const columns[3],
                            const ColumnFilter& luma, const ColumnFilter& chroma, int width) {
  switch (chroma.taps) {
    case 2: return filter_ycc_taps<kLuma, 2>(out, columns, luma, chroma, width);
    case 3: return filter_ycc_taps<kLuma, 3>(out, columns, luma, chroma, width);
    default: return filter_ycc_taps<kLuma, 0>(out, columns, luma, chroma, width);
  }
}

void filter_horizontal_ycc(uint8_t* const* out, const uint16_t* const columns[3],
                           const ColumnFilter& luma, const ColumnFilter& chroma, int width) {
  if (!columns[1]) return filter_horizontal_grey(out, columns[0], luma, width);
  switch (luma.taps) {
    case 2: return filter_ycc_luma<2>(out, columns, luma, chroma, width);
    case 3: return filter_ycc_luma<3>(out, columns, luma, chroma, width);
    case 4: return filter_ycc_luma<4>(out, columns, luma, chroma, width);
    default: return filter_ycc_luma<0>(out, columns, luma, chroma, width);
  }
}

}  // namespace

const Kernels MATRYOSHKA_KERNELS = {filter_vertical,       transpose,     filter_horizontal,
                                    filter_horizontal_ycc, decode_blocks, equal_blocks,
                                    recode_blocks};

}  // namespace matryoshka
