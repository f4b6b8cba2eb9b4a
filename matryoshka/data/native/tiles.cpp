#include "tiles.hpp"

#include <algorithm>
#include <cstring>

#include "entropy.hpp"
#include "jpeg_markers.hpp"

namespace matryoshka {
namespace {

// libjpeg's fast Huffman decoder runs only while 128 bytes per block of the MCU lie ahead
// (jdhuff.c, BUFSIZE); an MCU has up to 10 blocks.
constexpr size_t kStreamPadding = 1280;

constexpr int kMaxSide = 65500;  // JPEG_MAX_DIMENSION of libjpeg, which decodes most files

int read_u16(const uint8_t* p) { return p[0] << 8 | p[1]; }

uint8_t high_byte(int value) { return static_cast<uint8_t>(value >> 8); }
uint8_t low_byte(int value) { return static_cast<uint8_t>(value); }

int divide_up(int value, int unit) { return (value + unit - 1) / unit; }

// ---- header segments; `body` is what follows the length ----

// B.2.2: frame header.
bool read_sof(Bytes body, Frame* frame) {
  const uint8_t* p = body.data;
  if (body.size < 6 || p[0] != 8) return false;  // 8 bits per sample
  frame->height = read_u16(p + 1);
  frame->width = read_u16(p + 3);
  frame->components = p[5];
  if (frame->height == 0 || frame->width == 0) return false;  // height 0: a DNL segment has it
  if (frame->height > kMaxSide || frame->width > kMaxSide) return false;
  if (frame->components != 1 && frame->components != 3) return false;
  if (body.size != 6 + 3 * static_cast<size_t>(frame->components)) return false;
  frame->max_h = 1;
  frame->max_v = 1;
  for (int i = 0; i < frame->components; ++i) {
    const uint8_t* c = p + 6 + 3 * i;
    const int h = c[1] >> 4;
    const int v = c[1] & 15;
    if (h < 1 || h > 4 || v < 1 || v > 4 || c[2] > 3) return false;
    frame->component[i] = {c[0], h, v, c[2], 0, 0};
    frame->max_h = std::max(frame->max_h, h);
    frame->max_v = std::max(frame->max_v, v);
  }
  frame->mcu_width = frame->interleaved() ? 8 * frame->max_h : 8;
  frame->mcu_height = frame->interleaved() ? 8 * frame->max_v : 8;
  frame->mcus_per_row = divide_up(frame->width, frame->mcu_width);
  frame->mcu_rows = divide_up(frame->height, frame->mcu_height);
  return true;
}

// B.2.4.2: Huffman tables. Tc is 0 or 1, Th at most 3: other bits must be zero.
bool read_dht(Bytes body, Frame* frame) {
  while (body.size) {
    const uint8_t class_and_id = body.data[0];
    if (body.size < 17 || class_and_id & 0xEC) return false;
    size_t size = 16;
    for (int i = 1; i <= 16; ++i) size += body.data[i];
    if (size > 16 + 256 || size > body.size - 1) return false;
    frame->huffman_tables[class_and_id >> 4][class_and_id & 3] = {body.data + 1, size};
    body = {body.data + 1 + size, body.size - 1 - size};
  }
  return true;
}

// B.2.4.1: quantisation tables. Pq is 0 (8 bits) or 1 (16 bits), Tq at most 3.
bool read_dqt(Bytes body, Frame* frame) {
  while (body.size) {
    const uint8_t precision_and_id = body.data[0];
    if (precision_and_id & 0xEC) return false;
    const size_t size = precision_and_id >> 4 ? 128 : 64;
    if (size > body.size - 1) return false;
    frame->quant_tables[precision_and_id & 3] = {body.data + 1, size};
    body = {body.data + 1 + size, body.size - 1 - size};
  }
  return true;
}

// B.2.3: scan header. False unless it has all components in order and the whole spectrum (Ss = 0,
// Se = 63, Ah = Al = 0).
bool read_sos(Bytes body, Frame* frame) {
  const int n = frame->components;
  if (body.size != 4 + 2 * static_cast<size_t>(n)) return false;
  for (int i = 0; i < n; ++i) {
    const uint8_t* c = body.data + 1 + 2 * i;
    if (c[0] != frame->component[i].id || c[1] & 0xCC) return false;
    frame->component[i].dc_table = c[1] >> 4;
    frame->component[i].ac_table = c[1] & 3;
  }
  const uint8_t* spectrum = body.data + 1 + 2 * n;
  return spectrum[0] == 0 && spectrum[1] == 63 && spectrum[2] == 0;
}

// Guesses the colour space as libjpeg does (jdapimin.c, default_decompress_parms).
struct ColourSpace {
  bool jfif = false;
  bool adobe = false;
  int adobe_transform = 0;

  void read_app(uint8_t marker, Bytes body) {
    if (marker == M_APP0 && body.size >= 14 && std::memcmp(body.data, "JFIF", 5) == 0) jfif = true;
    if (marker == M_APP14 && body.size >= 12 && std::memcmp(body.data, "Adobe", 5) == 0) {
      adobe = true;
      adobe_transform = body.data[11];
    }
  }
  bool is_ycc_or_grey(const Frame& frame) const {
    if (frame.components == 1 || jfif) return true;
    if (adobe) return adobe_transform != 0;
    const Frame::Component* c = frame.component;
    return !(c[0].id == 'R' && c[1].id == 'G' && c[2].id == 'B');
  }
};

}  // namespace

bool Tiles::parse(Bytes jpeg) {
  jpeg_ = jpeg;
  frame_ = {};
  header_.clear();
  const uint8_t* data = jpeg.data;
  if (jpeg.size < 4 || data[0] != 0xFF || data[1] != M_SOI) return false;
  size_t at = 2;
  ColourSpace colours;
  bool tables_valid = true;
  for (;;) {
    const size_t begin = at;
    if (jpeg.size - at < 4 || data[at] != 0xFF) return false;
    while (data[at + 1] == 0xFF) {  // fill bytes (B.1.1.2)
      ++at;
      if (jpeg.size - at < 4) return false;
    }
    const uint8_t marker = data[at + 1];
    const size_t length = read_u16(data + at + 2);
    const size_t end = at + 2 + length;
    if (length < 2 || end > jpeg.size) return false;
    const Bytes body{data + at + 4, length - 2};
    const size_t body_at = at + 4;
    at = end;
    switch (marker) {
      case M_SOF0:
      case M_SOF1:
        if (frame_.width || !read_sof(body, &frame_)) return false;
        frame_.size_offset = body_at + 1;
        break;
      case M_DRI:  // B.2.4.4
        if (length != 4) return false;
        frame_.restart_interval = read_u16(body.data);
        continue;  // write_header makes a new one
      case M_SOS: {
        const bool all_components = body.size >= 1 && body.data[0] == frame_.components;
        if (!frame_.width || !all_components) return false;
        header_.push_back({begin, end});
        frame_.entropy_begin = end;
        const bool baseline = read_sos(body, &frame_);
        frame_.ordinary = baseline && tables_valid && colours.is_ycc_or_grey(frame_);
        return true;
      }
      case M_DQT: tables_valid &= read_dqt(body, &frame_); break;
      case M_DHT: tables_valid &= read_dht(body, &frame_); break;
      case M_APP0:
      case M_APP14: colours.read_app(marker, body); break;
      default:
        if ((marker >= M_APP0 && marker <= M_APP15) || marker == M_COM) continue;  // no pixels
        return false;
    }
    header_.push_back({begin, end});
  }
}

bool Tiles::find_segments(size_t last) {
  const size_t mcus = static_cast<size_t>(frame_.mcus_per_row) * frame_.mcu_rows;
  const size_t interval = frame_.restart_interval;
  const size_t total = interval ? (mcus + interval - 1) / interval : 1;
  segments_.clear();
  segments_.push_back(frame_.entropy_begin);
  const uint8_t* const end = jpeg_.data + jpeg_.size;
  const uint8_t* at = jpeg_.data + frame_.entropy_begin;
  for (;;) {
    at = static_cast<const uint8_t*>(std::memchr(at, 0xFF, end - at));
    if (!at) break;
    const uint8_t* const first = at;
    while (at != end && *at == 0xFF) ++at;  // any number of fill bytes precede a marker
    if (at == end) break;
    const uint8_t marker = *at++;
    if (marker == 0) {                   // a stuffed 0xFF
      if (at - first > 2) return false;  // see has_filled_stuffing
      continue;
    }

    const bool is_restart = M_RST0 <= marker && marker <= M_RST7;
    const bool ends_last = segments_.size() == last + 1;
    if (ends_last && segments_.size() == total) {  // the image's last segment
      last_end_ = first - jpeg_.data;
      return !is_restart;
    }
    if (marker != restart_marker(static_cast<int64_t>(segments_.size()) - 1)) return false;
    if (ends_last) {
      last_end_ = first - jpeg_.data;
      return true;
    }
    segments_.push_back(at - jpeg_.data);
  }
  last_end_ = jpeg_.size;  // a file may lack its EOI marker
  return segments_.size() == total && last + 1 == total;
}

Bytes Tiles::segment(size_t k) const {
  const size_t begin = segments_[k];
  const size_t end = k + 1 < segments_.size() ? segments_[k + 1] - 2 : last_end_;
  return {jpeg_.data + begin, end - begin};
}

// find_segments has made sure that a segment has no markers: every 0xFF is stuffed.
Bytes Tiles::unstuffed(size_t k) {
  const Bytes from = segment(k);
  const size_t capacity = from.size + kSegmentPadding;
  if (unstuffed_.size() < capacity) unstuffed_.resize(capacity);
  uint8_t* to = unstuffed_.data();
  const uint8_t* at = from.data;
  const uint8_t* const end = at + from.size;
  while (at < end) {
    const uint8_t* stop = static_cast<const uint8_t*>(std::memchr(at, 0xFF, end - at));
    if (!stop) stop = end;
    std::memcpy(to, at, stop - at);
    to += stop - at;
    at = stop;
    while (at < end && *at == 0xFF) ++at;
    if (at < end) {  // else the file ends between 0xFF and its zero
      *to++ = 0xFF;
      ++at;
    }
  }
  std::memset(to, 0, kSegmentPadding);
  return {unstuffed_.data(), static_cast<size_t>(to - unstuffed_.data())};
}

// The header with a new size and restart interval.
void Tiles::write_header(int width, int height) {
  const int interval = frame_.restart_interval;
  stream_.assign({0xFF, M_SOI});
  for (const HeaderPart& part : header_) {
    const bool is_sos = part.end == frame_.entropy_begin;
    if (is_sos) {
      stream_.insert(stream_.end(), {0xFF, M_DRI, 0, 4, high_byte(interval), low_byte(interval)});
    }
    const size_t at = stream_.size();
    stream_.insert(stream_.end(), jpeg_.data + part.begin, jpeg_.data + part.end);
    const bool is_sof = part.begin < frame_.size_offset && frame_.size_offset < part.end;
    if (is_sof) {
      uint8_t* size = stream_.data() + at + (frame_.size_offset - part.begin);
      size[0] = high_byte(height);
      size[1] = low_byte(height);
      size[2] = high_byte(width);
      size[3] = low_byte(width);
    }
  }
}

void Tiles::write_restart_marker() {
  stream_.insert(stream_.end(), {0xFF, restart_marker(num_restarts_++)});
}

// Append the segments [first, last], which follow each other in the file, and renumber the markers
// between them.
void Tiles::copy_segments(size_t first, size_t last) {
  const size_t begin = segments_[first];
  const size_t end = last + 1 < segments_.size() ? segments_[last + 1] - 2 : last_end_;
  const size_t to = stream_.size();
  stream_.insert(stream_.end(), jpeg_.data + begin, jpeg_.data + end);
  for (size_t k = first + 1; k <= last; ++k) {
    stream_[to + segments_[k] - begin - 1] = restart_marker(num_restarts_++);
  }
}

bool Tiles::splice(const Crop& crop) {
  const Frame& f = frame_;
  const int interval = f.restart_interval;
  // Only divisors of a row: otherwise a wrong interval in the header would go unnoticed, because
  // some segments are read only in part.
  if (interval == 0 || f.mcus_per_row % interval || jpeg_.size > UINT32_MAX) return false;

  // Fancy upsampling of chroma looks at the neighbouring sample, up to 2 pixels away.
  const int margin_x = f.max_h > 1 ? 2 : 0;
  const int margin_y = f.max_v > 1 ? 2 : 0;
  int left = std::max(0, crop.x - margin_x) / f.mcu_width;
  int right = std::min(f.mcus_per_row, divide_up(crop.x + crop.width + margin_x, f.mcu_width));
  const int top = std::max(0, crop.y - margin_y) / f.mcu_height;
  const int bottom = std::min(f.mcu_rows, divide_up(crop.y + crop.height + margin_y, f.mcu_height));

  left = left / interval * interval;
  right = divide_up(right, interval) * interval;
  // libjpeg upsamples images of up to 2 chroma columns differently. The image's last tile may be as
  // narrow as that: take one more.
  const int width = std::min(f.width, right * f.mcu_width) - left * f.mcu_width;
  if (width < 4 * f.max_h) left = std::max(0, left - interval);
  if (left == 0 && right == f.mcus_per_row && top == 0) return false;  // only the end is left out

  const auto segment_of = [&](int row, int column) {
    return (static_cast<size_t>(row) * f.mcus_per_row + column) / interval;
  };
  if (!find_segments(segment_of(bottom - 1, right - 1))) return false;

  x_ = left * f.mcu_width;
  y_ = top * f.mcu_height;
  write_header(std::min(f.width, right * f.mcu_width) - x_,
               std::min(f.height, bottom * f.mcu_height) - y_);
  num_restarts_ = 0;
  for (int row = top; row < bottom; ++row) {
    if (row > top) write_restart_marker();
    copy_segments(segment_of(row, left), segment_of(row, right - 1));
  }
  data_end_ = stream_.size();
  stream_.insert(stream_.end(), {0xFF, M_EOI});
  stream_.resize(stream_.size() + kStreamPadding);
  return true;
}

}  // namespace matryoshka
