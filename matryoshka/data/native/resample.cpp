#include "resample.hpp"

#include <algorithm>
#include <cstring>

namespace matryoshka {
namespace {

size_t round_up_to_8(size_t n) { return (n + 7) / 8 * 8; }

// ---- more than kMaxNarrowTaps taps: sums of truncated 16-bit products would be too inexact ----

void add_wide_row(uint32_t* __restrict sum, const uint8_t* __restrict row, size_t n,
                  uint32_t weight) {
  for (size_t i = 0; i < n; ++i) sum[i] += row[i] * weight;
}

void narrow_row(uint16_t* __restrict narrow, const uint32_t* __restrict sum, size_t n) {
  for (size_t i = 0; i < n; ++i) narrow[i] = static_cast<uint16_t>((sum[i] + 128) >> 8);
}

void filter_horizontal_wide(uint8_t* out, const uint16_t* row, const ColumnFilter& filter,
                            int width) {
  const uint32_t* weights = filter.weights;
  for (int x = 0; x < width; ++x, weights += filter.taps) {
    const uint16_t* pixel = row + 3 * static_cast<size_t>(filter.starts[x]);
    uint32_t total[3] = {1u << 23, 1u << 23, 1u << 23};  // 8.24; half a grey level
    for (int k = 0; k < filter.taps; ++k, pixel += 3) {
      for (int c = 0; c < 3; ++c) total[c] += pixel[c] * (weights[k] & 0xFFFF);
    }
    for (int c = 0; c < 3; ++c) *out++ = static_cast<uint8_t>(total[c] >> 24);
  }
}

}  // namespace

// ---- batch of rows ----

void RowBatch::begin(Image out) {
  out_ = out;
  rows_ = 0;
  done_ = 0;
}

uint16_t* RowBatch::current_row(int p, size_t n) {
  stride_[p] = round_up_to_8(n);
  const size_t size = kBatchRows * stride_[p];
  if (rows_of_[p].size() < size) rows_of_[p].resize(size);
  return rows_of_[p].data() + rows_ * stride_[p];
}

const uint16_t* RowBatch::transposed(int p, size_t n) {
  const size_t padded = round_up_to_8(n);
  if (columns_[p].size() < kBatchRows * padded) columns_[p].resize(kBatchRows * padded);
  kernels().transpose(columns_[p].data(), rows_of_[p].data(), stride_[p], padded);
  return columns_[p].data();
}

uint8_t* const* RowBatch::output_rows() {
  const size_t row_bytes = 3 * round_up_to_8(out_.width);
  if (staging_.size() < kBatchRows * row_bytes) staging_.resize(kBatchRows * row_bytes);
  const bool direct = out_.width % 8 == 0;  // whole groups of 8 fit into the image
  for (int i = 0; i < kBatchRows; ++i) {
    output_rows_[i] = direct && i < rows_ ? image_row(i) : staging_.data() + i * row_bytes;
  }
  return output_rows_;
}

void RowBatch::finish() {
  const size_t row_bytes = 3 * static_cast<size_t>(out_.width);
  if (out_.width % 8 != 0) {
    for (int i = 0; i < rows_; ++i) std::memcpy(image_row(i), output_rows_[i], row_bytes);
  }
  finish_in_place();
}

void RowBatch::finish_in_place() {
  done_ += rows_;
  rows_ = 0;
}

// ---- RGB rows ----

void Resampler::begin(const Crop& crop, int subsampling, Image out) {
  rows_.compute(crop.y, crop.height, subsampling, out.height);
  columns_.compute_columns(crop.x, crop.width, subsampling, out.width, crop.flip != 0);
  batch_.begin(out);
  row_bytes_ = 3 * static_cast<size_t>(columns_.source_size());
  window_ = many_taps() ? 1 : rows_.max_taps();
  recent_.assign(window_, nullptr);
  next_row_ = 0;
  next_out_ = 0;
}

void Resampler::add_wide(const uint8_t* row, int tap) {
  if (tap == 0) wide_sum_.assign(row_bytes_, 0);
  add_wide_row(wide_sum_.data(), row, row_bytes_, rows_.weights(next_out_)[tap]);
  if (tap == rows_[next_out_].count - 1)
    narrow_row(batch_.current_row(0, row_bytes_), wide_sum_.data(), row_bytes_);
}

// The vertical filter has made one row; filter the batch horizontally if it is full.
void Resampler::finish_row() {
  ++next_out_;
  if (!batch_.next() && next_out_ < rows_.size()) return;
  const ColumnFilter filter = columns_.column_filter();
  const int width = columns_.size();
  if (filter.taps > kMaxNarrowTaps) {
    for (int i = 0; i < batch_.rows(); ++i) {
      filter_horizontal_wide(batch_.image_row(i), batch_.row(0, i), filter, width);
    }
    batch_.finish_in_place();
  } else {
    const uint16_t* columns = batch_.transposed(0, row_bytes_);
    const int padded = static_cast<int>(round_up_to_8(width));
    kernels().filter_horizontal(batch_.output_rows(), columns, filter, padded);
    batch_.finish();
  }
}

// Add the row to the output row in progress, and to the next one where the border between them is
// in this row.
void Resampler::push_wide(const uint8_t* row) {
  while (next_out_ < rows_.size() && rows_[next_out_].start <= next_row_) {
    const int tap = next_row_ - rows_[next_out_].start;
    add_wide(row, tap);
    if (tap < rows_[next_out_].count - 1) break;
    finish_row();
  }
}

// Make every output row that ends with this row.
void Resampler::push_narrow() {
  const uint8_t* rows[kMaxNarrowTaps];
  while (next_out_ < rows_.size()) {
    const Taps::Span& span = rows_[next_out_];
    if (span.start + span.count - 1 != next_row_) break;
    for (int k = 0; k < span.count; ++k) rows[k] = recent_[(span.start + k) % window_];
    kernels().filter_vertical(batch_.current_row(0, row_bytes_), rows, rows_.weights(next_out_),
                              span.count, row_bytes_);
    finish_row();
  }
}

void Resampler::push(const uint8_t* row) {
  recent_[next_row_ % window_] = row;
  if (many_taps()) {
    push_wide(row);
  } else {
    push_narrow();
  }
  ++next_row_;
}

// ---- planes ----

bool PlaneResampler::resample(const PlaneView* planes, int count, const Crop& crop, Image out) {
  for (int i = 0; i < (count > 1 ? 2 : 1); ++i) {
    rows_[i].compute(crop.y, crop.height, planes[i].sub_y, out.height);
    columns_[i].compute_columns(crop.x, crop.width, planes[i].sub_x, out.width, crop.flip != 0);
    if (rows_[i].max_taps() > kMaxNarrowTaps) return false;
    if (columns_[i].max_taps() > kMaxNarrowTaps) return false;
  }
  const int padded = static_cast<int>(round_up_to_8(out.width));
  batch_.begin(out);
  for (int y = 0; y < out.height; ++y) {
    for (int p = 0; p < count; ++p) {
      const Taps& taps = rows_[p > 0];
      const Taps::Span& span = taps[y];
      const size_t n = columns_[p > 0].source_size();
      const uint8_t* rows[kMaxNarrowTaps];
      for (int k = 0; k < span.count; ++k) {
        rows[k] = planes[p].pixels + planes[p].stride * (span.start + k);
      }
      kernels().filter_vertical(batch_.current_row(p, n), rows, taps.weights(y), span.count, n);
    }
    if (!batch_.next() && y < out.height - 1) continue;
    const uint16_t* columns[3] = {};
    for (int p = 0; p < count; ++p) {
      columns[p] = batch_.transposed(p, columns_[p > 0].source_size());
    }
    kernels().filter_horizontal_ycc(batch_.output_rows(), columns, columns_[0].column_filter(),
                                    columns_[1].column_filter(), padded);
    batch_.finish();
  }
  return true;
}

}  // namespace matryoshka
