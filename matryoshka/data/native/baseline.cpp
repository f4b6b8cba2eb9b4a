#include "baseline.hpp"

#include <algorithm>

#include "image_kernels.hpp"

namespace matryoshka {

// Planes of larger crops do not pay in a cache, and a header alone must not allocate them: rows do
// with less.
constexpr size_t kMaxBytes = size_t{16} << 20;

bool BaselineDecoder::accepts(const Tiles& tiles) {
  const Frame& f = tiles.frame();
  if (!f.plain) return false;
  scan_.components = f.components;
  scan_.columns = f.columns;
  int blocks = 0;
  for (int i = 0; i < f.components; ++i) {
    const Frame::Component& from = f.component[i];
    const Bytes factors = f.factors[from.factors], dc = f.huffman[0][from.dc],
                ac = f.huffman[1][from.ac];
    if (!factors.data || !dc.data || !ac.data) return false;
    if (f.max_h % from.h || f.max_v % from.v) return false;
    if (i == 2 && (from.h != f.component[1].h || from.v != f.component[1].v)) return false;
    if (!tables_[0][from.dc].define(dc.data, dc.size, true)) return false;
    if (!tables_[1][from.ac].define(ac.data, ac.size, false)) return false;
    for (int k = 0; k < 64; ++k)
      factors_[from.factors][k] = static_cast<uint16_t>(
          factors.size == 64 ? factors.data[k]
                             : factors.data[2 * k] << 8 | factors.data[2 * k + 1]);
    const bool alone = f.components == 1;
    scan_.component[i] = {alone ? 1 : from.h,
                          alone ? 1 : from.v,
                          &tables_[0][from.dc],
                          &tables_[1][from.ac],
                          factors_[from.factors],
                          nullptr,
                          0,
                          0};
    plane_[i].sub_x = f.max_h / from.h;
    plane_[i].sub_y = f.max_v / from.v;
    blocks += from.h * from.v;
  }
  return f.components == 1 || blocks <= 10;
}

// Behind the last MCU of [begin, end) that lies in the box, or begin.
int64_t BaselineDecoder::end_of_wanted(int64_t begin, int64_t end) const {
  const int first_row = std::max(static_cast<int>(begin / scan_.columns), scan_.top);
  int row = std::min(static_cast<int>((end - 1) / scan_.columns), scan_.bottom - 1);
  for (; row >= first_row; --row) {
    const int64_t row_begin = int64_t{row} * scan_.columns;
    const int64_t low = std::max(begin, row_begin + scan_.left),
                  high = std::min(end, row_begin + scan_.right);
    if (low < high) return high;
  }
  return begin;
}

Status BaselineDecoder::decode(Tiles& tiles, const Crop& crop) {
  const Frame& f = tiles.frame();
  scan_.left = crop.x / f.mcu_width;
  scan_.right = (crop.x + crop.width + f.mcu_width - 1) / f.mcu_width;
  scan_.top = crop.y / f.mcu_height;
  scan_.bottom = (crop.y + crop.height + f.mcu_height - 1) / f.mcu_height;
  const int64_t total = int64_t{f.columns} * f.rows, interval = f.interval ? f.interval : total;
  const auto number = [&](int row, int column) {
    return (int64_t{row} * f.columns + column) / interval;
  };
  const int64_t last_segment = number(scan_.bottom - 1, scan_.right - 1);
  size_t needed = 0;
  for (int i = 0; i < f.components; ++i) {
    BlockScan::Component& c = scan_.component[i];
    c.stride = 8 * static_cast<size_t>(scan_.right - scan_.left) * c.h;
    needed += c.stride * 8 * (scan_.bottom - scan_.top) * c.v;
  }
  if (needed > kMaxBytes) return Status::too_large;
  if (!tiles.find_segments(last_segment)) return Status::corrupt;
  if (memory_.size() < needed) memory_.resize(needed);
  uint8_t* memory = memory_.data();
  for (int i = 0; i < f.components; ++i) {
    BlockScan::Component& c = scan_.component[i];
    c.plane = memory;
    memory += c.stride * 8 * (scan_.bottom - scan_.top) * c.v;
    PlaneView& plane = plane_[i];
    const size_t x = crop.x / plane.sub_x - 8 * static_cast<size_t>(scan_.left) * c.h;
    const size_t y = crop.y / plane.sub_y - 8 * static_cast<size_t>(scan_.top) * c.v;
    plane.stride = c.stride;
    plane.pixels = c.plane + y * c.stride + x;
  }

  // A header whose interval is not that of the data puts all blocks at wrong places. One segment
  // that is read to its end shows it; the image's last one may be shorter and shows nothing.
  const int64_t first_segment = number(scan_.top, scan_.left);
  const int64_t probe = std::min(first_segment, (total - 1) / interval - 1);
  for (int64_t k = std::max(int64_t{0}, std::min(probe, first_segment)); k <= last_segment; ++k) {
    const int64_t begin = k * interval, end = std::min(begin + interval, total);
    const int64_t wanted_end = k == probe ? end : end_of_wanted(begin, end);
    if (wanted_end == begin) continue;
    if (tiles.segment(k).size > kMaxBytes) return Status::too_large;
    const Bytes data = tiles.unstuffed(k);
    scan_.data = data.data;
    scan_.size = data.size;
    scan_.first = begin;
    scan_.last = wanted_end;
    scan_.complete = wanted_end == end && end < total;
    if (!kernels().decode_blocks(scan_)) return Status::corrupt;
  }
  return Status::ok;
}

}  // namespace matryoshka
