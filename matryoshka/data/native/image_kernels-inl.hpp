// The body of image_kernels.hpp's table: included by one file for each kind of CPU, with
// MATRYOSHKA_KERNELS as its name.
#include "image_kernels.hpp"
#include "lanes.hpp"

#include "entropy-inl.hpp"
#include "recode-inl.hpp"

namespace matryoshka {
namespace {

// Every product is truncated, by half a unit on average: sums begin with what they will lose.
template <int kTaps>
inline size_t blend(uint16_t* __restrict sum, const uint8_t* const* rows, const uint16_t* weights,
                    size_t n, uint16_t bias, bool add) {
  Lanes weight[kTaps];
  const uint8_t* row[kTaps];
  for (int k = 0; k < kTaps; ++k) weight[k] = all(weights[k]), row[k] = rows[k];
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Lanes total = add ? load(sum + i) : all(bias);
    for (int k = 0; k < kTaps; ++k) total = total + high(load_high(row[k] + i), weight[k]);
    store(sum + i, total);
  }
  for (; i < n; ++i) {
    uint32_t total = add ? sum[i] : bias;
    for (int k = 0; k < kTaps; ++k)
      total += (static_cast<uint32_t>(row[k][i] << 8) * weights[k]) >> 16;
    sum[i] = static_cast<uint16_t>(total);
  }
  return n;
}

void blend_rows(uint16_t* sum, const uint8_t* const* rows, const uint16_t* weights, int count,
                size_t n) {
  const uint16_t bias = static_cast<uint16_t>(count / 2);
  for (int k = 0; k < count; k += 4) {
    switch (count - k) {
      case 1: blend<1>(sum, rows + k, weights + k, n, bias, k > 0); break;
      case 2: blend<2>(sum, rows + k, weights + k, n, bias, k > 0); break;
      case 3: blend<3>(sum, rows + k, weights + k, n, bias, k > 0); break;
      default: blend<4>(sum, rows + k, weights + k, n, bias, k > 0);
    }
  }
}

void turn(uint16_t* lanes, const uint16_t* sums, size_t stride, size_t n) {
  for (size_t i = 0; i < n; i += 8) columns_of_rows(lanes + i * kLanes, sums + i, stride);
}

// The blend of columns in 8.8; step: numbers between neighbouring columns.
template <int kTaps, int kStep>
inline Lanes mix(const uint16_t* lanes, const uint32_t* weights, int taps, Lanes bias) {
  if (kTaps) taps = kTaps;
  Lanes total = bias;
  for (int k = 0; k < taps; ++k)
    total = total + high(load(lanes + k * (kStep * kLanes)), twice(weights + k));
  return total;
}

template <int kTaps>
inline void mix_rgb_taps(uint8_t* const* out, const uint16_t* lanes, const Columns& columns,
                         int width) {
  const int taps = kTaps ? kTaps : columns.taps;
  const Lanes bias = all(static_cast<uint16_t>(128 + taps / 2));
  const uint32_t* weights = columns.weights;
  for (int x = 0; x < width; x += 8) {
    Octets e[24];
    for (int i = 0; i < 8; ++i, weights += taps) {
      const uint16_t* first = lanes + static_cast<size_t>(columns.starts[x + i]) * (3 * kLanes);
      for (int c = 0; c < 3; ++c)
        e[3 * i + c] = octets(shifted<8>(mix<kTaps, 3>(first + c * kLanes, weights, taps, bias)));
    }
    for (int part = 0; part < 3; ++part)
      rows_of_columns(out, 3 * static_cast<size_t>(x) + 8 * part, e + 8 * part);
  }
}

void mix_rgb(uint8_t* const* out, const uint16_t* lanes, const Columns& columns, int width) {
  switch (columns.taps) {
    case 1: return mix_rgb_taps<1>(out, lanes, columns, width);
    case 2: return mix_rgb_taps<2>(out, lanes, columns, width);
    case 3: return mix_rgb_taps<3>(out, lanes, columns, width);
    case 4: return mix_rgb_taps<4>(out, lanes, columns, width);
    default: return mix_rgb_taps<0>(out, lanes, columns, width);
  }
}

template <int kLuma, int kChroma>
inline void mix_planes_taps(uint8_t* const* out, const uint16_t* const lanes[3],
                            const Columns& luma, const Columns& chroma, int width) {
  const int luma_taps = kLuma ? kLuma : luma.taps, chroma_taps = kChroma ? kChroma : chroma.taps;
  const Lanes luma_bias = all(static_cast<uint16_t>(luma_taps / 2));
  const Lanes chroma_bias = all(static_cast<uint16_t>(chroma_taps / 2));
  // 1.402, 0.344136, 0.714136, 1.772 in 1/16384: a product's upper half of an 8.8 number is an 8.6
  // number.
  const Lanes red = all(22970), green_b = all(5638), green_r = all(11700), blue = all(29032);
  const Lanes middle = all(0x8000), half = all(32);
  const uint32_t *luma_weights = luma.weights, *chroma_weights = chroma.weights;
  for (int x = 0; x < width; x += 8) {
    Octets e[24];
    for (int i = 0; i < 8; ++i, luma_weights += luma_taps, chroma_weights += chroma_taps) {
      const size_t a = static_cast<size_t>(luma.starts[x + i]) * kLanes;
      const size_t b = static_cast<size_t>(chroma.starts[x + i]) * kLanes;
      const Lanes y =
          shifted<2>(mix<kLuma, 1>(lanes[0] + a, luma_weights, luma_taps, luma_bias)) + half;
      const Lanes cb =
          mix<kChroma, 1>(lanes[1] + b, chroma_weights, chroma_taps, chroma_bias) ^ middle;
      const Lanes cr =
          mix<kChroma, 1>(lanes[2] + b, chroma_weights, chroma_taps, chroma_bias) ^ middle;
      e[3 * i] = octets(shifted_signed<6>(y + high_signed(cr, red)));
      e[3 * i + 1] =
          octets(shifted_signed<6>(y - high_signed(cb, green_b) - high_signed(cr, green_r)));
      e[3 * i + 2] = octets(shifted_signed<6>(y + high_signed(cb, blue)));
    }
    for (int part = 0; part < 3; ++part)
      rows_of_columns(out, 3 * static_cast<size_t>(x) + 8 * part, e + 8 * part);
  }
}

void mix_grey(uint8_t* const* out, const uint16_t* lanes, const Columns& luma, int width) {
  const Lanes bias = all(static_cast<uint16_t>(128 + luma.taps / 2));
  const uint32_t* weights = luma.weights;
  for (int x = 0; x < width; x += 8) {
    Octets e[24];
    for (int i = 0; i < 8; ++i, weights += luma.taps) {
      const size_t first = static_cast<size_t>(luma.starts[x + i]) * kLanes;
      e[3 * i] = octets(shifted<8>(mix<0, 1>(lanes + first, weights, luma.taps, bias)));
      e[3 * i + 1] = e[3 * i + 2] = e[3 * i];
    }
    for (int part = 0; part < 3; ++part)
      rows_of_columns(out, 3 * static_cast<size_t>(x) + 8 * part, e + 8 * part);
  }
}

template <int kLuma>
inline void mix_planes_luma(uint8_t* const* out, const uint16_t* const lanes[3],
                            const Columns& luma, const Columns& chroma, int width) {
  switch (chroma.taps) {
    case 2: return mix_planes_taps<kLuma, 2>(out, lanes, luma, chroma, width);
    case 3: return mix_planes_taps<kLuma, 3>(out, lanes, luma, chroma, width);
    default: return mix_planes_taps<kLuma, 0>(out, lanes, luma, chroma, width);
  }
}

void mix_planes(uint8_t* const* out, const uint16_t* const lanes[3], const Columns& luma,
                const Columns& chroma, int width) {
  if (!lanes[1]) return mix_grey(out, lanes[0], luma, width);
  switch (luma.taps) {
    case 2: return mix_planes_luma<2>(out, lanes, luma, chroma, width);
    case 3: return mix_planes_luma<3>(out, lanes, luma, chroma, width);
    case 4: return mix_planes_luma<4>(out, lanes, luma, chroma, width);
    default: return mix_planes_luma<0>(out, lanes, luma, chroma, width);
  }
}

}  // namespace

const Kernels MATRYOSHKA_KERNELS = {blend_rows, turn,          mix_rgb,
                                    mix_planes, decode_blocks, recode_blocks};

}  // namespace matryoshka
