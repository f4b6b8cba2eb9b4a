#include "baseline.hpp"

#include <algorithm>
#include <cstring>

#include "image_kernels.hpp"

namespace matryoshka {

// Larger planes do not stay in a cache, where decoding row by row is faster; and a header alone
// must not make us allocate much memory.
constexpr size_t kMaxBytes = size_t{16} << 20;

namespace {

// 64 numbers of 8 or 16 bits, in zigzag order. False for a zero, which T.81, B.2.4.1 forbids.
bool copy_quant_table(Bytes from, uint16_t* to) {
  for (int k = 0; k < 64; ++k) {
    const int value = from.size == 64 ? from.data[k] : from.data[2 * k] << 8 | from.data[2 * k + 1];
    to[k] = static_cast<uint16_t>(value);
  }
  return std::find(to, to + 64, 0) == to + 64;
}

// In MCUs.
struct Box {
  int left, right, top, bottom;
};

// The MCUs that a crop touches.
Box touched(const Frame& f, const Crop& crop) {
  return {crop.x / f.mcu_width, (crop.x + crop.width + f.mcu_width - 1) / f.mcu_width,
          crop.y / f.mcu_height, (crop.y + crop.height + f.mcu_height - 1) / f.mcu_height};
}

}  // namespace

bool BaselineDecoder::accepts(const Tiles& tiles) {
  const Frame& f = tiles.frame();
  if (!f.ordinary) return false;
  job_.components = f.components;
  job_.mcus_per_row = f.mcus_per_row;
  int blocks = 0;  // of an MCU
  for (int i = 0; i < f.components; ++i) {
    const Frame::Component& from = f.component[i];
    const Bytes quant_table = f.quant_tables[from.quant_table];
    const Bytes dc = f.huffman_tables[0][from.dc_table];
    const Bytes ac = f.huffman_tables[1][from.ac_table];
    if (!quant_table.data || !dc.data || !ac.data) return false;
    // A sample covers a whole number of pixels, the same for Cb and Cr.
    if (f.max_h % from.h || f.max_v % from.v) return false;
    if (i == 2 && (from.h != f.component[1].h || from.v != f.component[1].v)) return false;

    HuffmanTable& dc_table = tables_[0][from.dc_table];
    HuffmanTable& ac_table = tables_[1][from.ac_table];
    if (!dc_table.build(dc.data, dc.size, true)) return false;
    if (!ac_table.build(ac.data, ac.size, false)) return false;
    if (!copy_quant_table(quant_table, quant_tables_[from.quant_table])) return false;

    DecodeJob::Component& c = job_.component[i];
    c = {};
    c.h = f.interleaved() ? from.h : 1;
    c.v = f.interleaved() ? from.v : 1;
    c.dc = &dc_table;
    c.ac = &ac_table;
    c.quant_table = quant_tables_[from.quant_table];
    plane_[i].sub_x = f.max_h / from.h;
    plane_[i].sub_y = f.max_v / from.v;
    blocks += from.h * from.v;
  }
  return !f.interleaved() || blocks <= 10;  // the limit of B.2.3
}

// The box around the MCUs that the crops touch.
void BaselineDecoder::set_box(const Frame& f, const View* views, size_t count) {
  Box all = touched(f, views[0].crop);
  for (size_t v = 1; v < count; ++v) {
    const Box box = touched(f, views[v].crop);
    all.left = std::min(all.left, box.left);
    all.right = std::max(all.right, box.right);
    all.top = std::min(all.top, box.top);
    all.bottom = std::max(all.bottom, box.bottom);
  }
  job_.left = all.left;
  job_.right = all.right;
  job_.top = all.top;
  job_.bottom = all.bottom;
  job_.wanted = nullptr;
}

// The MCUs of the box that a crop touches. Those between crops are left out: decoding all crops at
// once never takes more blocks than one by one.
void BaselineDecoder::map_boxes(const Frame& f, const View* views, size_t count) {
  const size_t width = job_.right - job_.left;
  wanted_.assign(width * (job_.bottom - job_.top), 0);
  for (size_t v = 0; v < count; ++v) {
    const Box box = touched(f, views[v].crop);
    for (int row = box.top; row < box.bottom; ++row)
      std::memset(wanted_.data() + job_.box_place(row, box.left), 1, box.right - box.left);
  }
  job_.wanted = wanted_.data();
}

// Lay out the planes of the box in memory_. False if they are larger than kMaxBytes.
bool BaselineDecoder::allocate_planes() {
  const size_t box_width = job_.right - job_.left;
  const size_t box_height = job_.bottom - job_.top;
  size_t needed = 0;
  for (int i = 0; i < job_.components; ++i) {
    DecodeJob::Component& c = job_.component[i];
    c.stride = 8 * box_width * c.h;
    needed += c.stride * 8 * box_height * c.v;
  }
  if (needed > kMaxBytes) return false;
  if (memory_.size() < needed) memory_.resize(needed);
  uint8_t* memory = memory_.data();
  for (int i = 0; i < job_.components; ++i) {
    DecodeJob::Component& c = job_.component[i];
    c.plane = memory;
    memory += c.stride * 8 * box_height * c.v;
    plane_[i].stride = c.stride;
  }
  return true;
}

const PlaneView* BaselineDecoder::planes(const Crop& crop) {
  for (int i = 0; i < job_.components; ++i) {
    const DecodeJob::Component& c = job_.component[i];
    PlaneView& plane = plane_[i];
    const size_t x = crop.x / plane.sub_x - 8 * static_cast<size_t>(job_.left) * c.h;
    const size_t y = crop.y / plane.sub_y - 8 * static_cast<size_t>(job_.top) * c.v;
    plane.pixels = c.plane + y * c.stride + x;
  }
  return plane_;
}

// The end of the last MCU of [begin, end) that is to be decoded; `begin` if no MCU is.
int64_t BaselineDecoder::needed_end(int64_t begin, int64_t end) const {
  const int first_row = std::max(static_cast<int>(begin / job_.mcus_per_row), job_.top);
  int row = std::min(static_cast<int>((end - 1) / job_.mcus_per_row), job_.bottom - 1);
  for (; row >= first_row; --row) {
    const int64_t row_begin = int64_t{row} * job_.mcus_per_row;
    const int64_t low = std::max(begin, row_begin + job_.left);
    for (int64_t high = std::min(end, row_begin + job_.right); low < high; --high) {
      const int column = static_cast<int>(high - 1 - row_begin);
      if (!job_.wanted || job_.wanted[job_.box_place(row, column)]) return high;
    }
  }
  return begin;
}

Status BaselineDecoder::decode(Tiles& tiles, const View* views, size_t count) {
  const Frame& f = tiles.frame();
  set_box(f, views, count);
  if (!allocate_planes()) return Status::too_large;
  if (count > 1) map_boxes(f, views, count);
  const int64_t total = int64_t{f.mcus_per_row} * f.mcu_rows;
  const int64_t interval = f.restart_interval ? f.restart_interval : total;
  const auto segment_of = [&](int row, int column) {
    return (int64_t{row} * f.mcus_per_row + column) / interval;
  };
  // A header with a wrong restart interval would put all blocks in wrong places. Reading one
  // segment to its end reveals that; the image's last segment may be shorter and reveals nothing.
  // Every view has its own probe, so that it accepts the same data as alone.
  probes_.clear();
  int64_t last_segment = 0;
  for (size_t v = 0; v < count; ++v) {
    const Box box = touched(f, views[v].crop);
    probes_.push_back(std::min(segment_of(box.top, box.left), (total - 1) / interval - 1));
    last_segment = std::max(last_segment, segment_of(box.bottom - 1, box.right - 1));
  }
  if (!tiles.find_segments(last_segment)) return Status::corrupt;

  const int64_t first_probe = *std::min_element(probes_.begin(), probes_.end());
  for (int64_t k = std::max(int64_t{0}, first_probe); k <= last_segment; ++k) {
    const int64_t begin = k * interval;
    const int64_t end = std::min(begin + interval, total);
    const bool probe = std::find(probes_.begin(), probes_.end(), k) != probes_.end();
    const int64_t decode_end = probe ? end : needed_end(begin, end);
    if (decode_end == begin) continue;
    if (tiles.segment(k).size > kMaxBytes) return Status::too_large;
    const Bytes data = tiles.unstuffed(k);
    job_.data = data.data;
    job_.size = data.size;
    job_.first = begin;
    job_.last = decode_end;
    job_.complete = decode_end == end && end < total;
    if (!kernels().decode_blocks(job_)) return Status::corrupt;
  }
  return Status::ok;
}

}  // namespace matryoshka
