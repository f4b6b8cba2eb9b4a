#include "resample.hpp"

#include <algorithm>
#include <cstring>

namespace matryoshka {
namespace {

size_t whole_groups(size_t n) { return (n + 7) / 8 * 8; }

void add_wide_row(uint32_t* __restrict sum, const uint8_t* __restrict row, size_t n,
                  uint32_t weight) {
  for (size_t i = 0; i < n; ++i) sum[i] += row[i] * weight;
}

void narrow_row(uint16_t* __restrict narrow, const uint32_t* __restrict sum, size_t n) {
  for (size_t i = 0; i < n; ++i) narrow[i] = static_cast<uint16_t>((sum[i] + 128) >> 8);
}

// For long runs of taps, where sums of truncated products would be off.
void mix_wide(uint8_t* out, const uint16_t* sum, const Columns& columns, int width) {
  const uint32_t* weights = columns.weights;
  for (int x = 0; x < width; ++x, weights += columns.taps) {
    const uint16_t* pixel = sum + 3 * static_cast<size_t>(columns.starts[x]);
    uint32_t total[3] = {1u << 23, 1u << 23, 1u << 23};
    for (int k = 0; k < columns.taps; ++k)
      for (int c = 0; c < 3; ++c)
        total[c] += pixel[3 * static_cast<size_t>(k) + c] * (weights[k] & 0xFFFF);
    for (int c = 0; c < 3; ++c) *out++ = static_cast<uint8_t>(total[c] >> 24);
  }
}

}  // namespace

void Batch::begin(Image out) {
  out_ = out;
  rows_ = done_ = 0;
}

uint16_t* Batch::sums(int p, size_t n) {
  stride_[p] = whole_groups(n);
  if (sums_[p].size() < kBatch * stride_[p]) sums_[p].resize(kBatch * stride_[p]);
  return sums_[p].data() + rows_ * stride_[p];
}

const uint16_t* Batch::turned(int p, size_t n) {
  const size_t groups = whole_groups(n);
  if (lanes_[p].size() < kBatch * groups) lanes_[p].resize(kBatch * groups);
  kernels().turn(lanes_[p].data(), sums_[p].data(), stride_[p], groups);
  return lanes_[p].data();
}

uint8_t* const* Batch::targets() {
  const size_t row = 3 * whole_groups(out_.width);
  if (stage_.size() < kBatch * row) stage_.resize(kBatch * row);
  const bool direct = out_.width % 8 == 0;
  for (int i = 0; i < kBatch; ++i)
    targets_[i] = direct && i < rows_ ? image_row(i) : stage_.data() + i * row;
  return targets_;
}

void Batch::finish() {
  const size_t row = 3 * static_cast<size_t>(out_.width);
  if (out_.width % 8 != 0)
    for (int i = 0; i < rows_; ++i) std::memcpy(image_row(i), targets_[i], row);
  leave();
}

void Batch::leave() {
  done_ += rows_;
  rows_ = 0;
}

void Resampler::begin(const Crop& crop, int sub, Image out) {
  rows_.compute(crop.y, crop.height, sub, out.height);
  columns_.compute_columns(crop.x, crop.width, sub, out.width, crop.flip != 0);
  batch_.begin(out);
  row_bytes_ = 3 * static_cast<size_t>(columns_.samples());
  window_ = rows_.longest() > kMaxNarrowTaps ? 1 : rows_.longest();
  recent_.assign(window_, nullptr);
  next_row_ = next_out_ = 0;
}

void Resampler::add_wide(const uint8_t* row, int tap) {
  if (tap == 0) wide_sum_.assign(row_bytes_, 0);
  add_wide_row(wide_sum_.data(), row, row_bytes_, rows_.weights(next_out_)[tap]);
  if (tap == rows_[next_out_].count - 1)
    narrow_row(batch_.sums(0, row_bytes_), wide_sum_.data(), row_bytes_);
}

void Resampler::emit() {
  ++next_out_;
  if (!batch_.next() && next_out_ < rows_.size()) return;
  const Columns columns = columns_.columns();
  const int width = columns_.size();
  if (columns.taps > kMaxNarrowTaps) {
    for (int i = 0; i < batch_.rows(); ++i)
      mix_wide(batch_.image_row(i), batch_.row(0, i), columns, width);
    batch_.leave();
  } else {
    const uint16_t* lanes = batch_.turned(0, row_bytes_);
    kernels().mix_rgb(batch_.targets(), lanes, columns, static_cast<int>(whole_groups(width)));
    batch_.finish();
  }
}

void Resampler::push(const uint8_t* row) {
  recent_[next_row_ % window_] = row;
  if (rows_.longest() > kMaxNarrowTaps) {
    // The output row in progress, and the next one where the border between them lies in this row.
    while (next_out_ < rows_.size() && rows_[next_out_].start <= next_row_) {
      const int tap = next_row_ - rows_[next_out_].start;
      add_wide(row, tap);
      if (tap < rows_[next_out_].count - 1) break;
      emit();
    }
  } else {  // every output row that ends with this row
    const uint8_t* rows[kMaxNarrowTaps];
    while (next_out_ < rows_.size()) {
      const Taps::Span& span = rows_[next_out_];
      if (span.start + span.count - 1 != next_row_) break;
      for (int k = 0; k < span.count; ++k) rows[k] = recent_[(span.start + k) % window_];
      kernels().blend_rows(batch_.sums(0, row_bytes_), rows, rows_.weights(next_out_), span.count,
                           row_bytes_);
      emit();
    }
  }
  ++next_row_;
}

bool PlaneResampler::resample(const PlaneView* planes, int count, const Crop& crop, Image out) {
  for (int i = 0; i < (count > 1 ? 2 : 1); ++i) {
    rows_[i].compute(crop.y, crop.height, planes[i].sub_y, out.height);
    columns_[i].compute_columns(crop.x, crop.width, planes[i].sub_x, out.width, crop.flip != 0);
    if (rows_[i].longest() > kMaxNarrowTaps || columns_[i].longest() > kMaxNarrowTaps) return false;
  }
  batch_.begin(out);
  for (int y = 0; y < out.height; ++y) {
    for (int p = 0; p < count; ++p) {
      const Taps& taps = rows_[p > 0];
      const Taps::Span& span = taps[y];
      const size_t n = columns_[p > 0].samples();
      const uint8_t* rows[kMaxNarrowTaps];
      for (int k = 0; k < span.count; ++k)
        rows[k] = planes[p].pixels + planes[p].stride * (span.start + k);
      kernels().blend_rows(batch_.sums(p, n), rows, taps.weights(y), span.count, n);
    }
    if (!batch_.next() && y < out.height - 1) continue;
    const uint16_t* lanes[3] = {};
    for (int p = 0; p < count; ++p) lanes[p] = batch_.turned(p, columns_[p > 0].samples());
    kernels().mix_planes(batch_.targets(), lanes, columns_[0].columns(), columns_[1].columns(),
                         static_cast<int>(whole_groups(out.width)));
    batch_.finish();
  }
  return true;
}

}  // namespace matryoshka
