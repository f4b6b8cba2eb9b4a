#include "tiles.hpp"

#include <algorithm>
#include <cstring>

#include "entropy.hpp"

namespace matryoshka {
namespace {

enum Marker : uint8_t {
  kFirstRestart = 0xD0,
  kStart = 0xD8,
  kEnd = 0xD9,
  kScan = 0xDA,
  kQuantisation = 0xDB,
  kInterval = 0xDD,
  kHuffman = 0xC4,
  kBaseline = 0xC0,
  kExtended = 0xC1,
  kApp0 = 0xE0,
  kApp14 = 0xEE,
  kApp15 = 0xEF,
  kComment = 0xFE,
};

// libjpeg decodes its fast way only while so many bytes lie ahead: 128 for each of up to 10 blocks.
constexpr size_t kPadding = 1280;

int word(const uint8_t* p) { return p[0] << 8 | p[1]; }

int round_up(int value, int unit) { return (value + unit - 1) / unit; }

bool read_frame(const uint8_t* body, size_t size, Frame* frame) {
  if (size < 6 || body[0] != 8) return false;
  frame->height = word(body + 1);
  frame->width = word(body + 3);
  frame->components = body[5];
  if (frame->height == 0 || frame->width == 0 || (frame->components != 1 && frame->components != 3))
    return false;
  if (size != 6 + 3 * static_cast<size_t>(frame->components)) return false;
  frame->max_h = frame->max_v = 1;
  for (int i = 0; i < frame->components; ++i) {
    const uint8_t* c = body + 6 + 3 * i;
    const int h = c[1] >> 4, v = c[1] & 15;
    if (h < 1 || h > 4 || v < 1 || v > 4 || c[2] > 3) return false;
    frame->component[i] = {c[0], h, v, c[2], 0, 0};
    frame->max_h = std::max(frame->max_h, h);
    frame->max_v = std::max(frame->max_v, v);
  }
  const bool alone =
      frame->components == 1;  // then an MCU is one block, whatever the sampling factors say
  frame->mcu_width = alone ? 8 : 8 * frame->max_h;
  frame->mcu_height = alone ? 8 : 8 * frame->max_v;
  frame->columns = round_up(frame->width, frame->mcu_width);
  frame->rows = round_up(frame->height, frame->mcu_height);
  return true;
}

bool read_huffman(Bytes body, Frame* frame) {
  while (body.size) {
    if (body.size < 17 || body.data[0] & 0xEC) return false;
    size_t size = 16;
    for (int i = 1; i <= 16; ++i) size += body.data[i];
    if (size > 16 + 256 || size > body.size - 1) return false;
    frame->huffman[body.data[0] >> 4][body.data[0] & 3] = {body.data + 1, size};
    body = {body.data + 1 + size, body.size - 1 - size};
  }
  return true;
}

bool read_factors(Bytes body, Frame* frame) {
  while (body.size) {
    if (body.data[0] & 0xEC) return false;
    const size_t size = body.data[0] >> 4 ? 128 : 64;
    if (size > body.size - 1) return false;
    frame->factors[body.data[0] & 3] = {body.data + 1, size};
    body = {body.data + 1 + size, body.size - 1 - size};
  }
  return true;
}

// Whether all is as an ordinary encoder writes it: components in their order, the full spectrum.
bool read_scan(Bytes body, Frame* frame) {
  const int n = frame->components;
  if (body.size != 4 + 2 * static_cast<size_t>(n)) return false;
  for (int i = 0; i < n; ++i) {
    const uint8_t* c = body.data + 1 + 2 * i;
    if (c[0] != frame->component[i].id || c[1] & 0xCC) return false;
    frame->component[i].dc = c[1] >> 4;
    frame->component[i].ac = c[1] & 3;
  }
  const uint8_t* spectrum = body.data + 1 + 2 * n;
  return spectrum[0] == 0 && spectrum[1] == 63 && spectrum[2] == 0;
}

// What libjpeg makes of the markers JFIF and Adobe and of the component numbers.
struct Colours {
  bool jfif = false, adobe = false;
  int transform = 0;

  void read_app(uint8_t marker, Bytes body) {
    if (marker == kApp0 && body.size >= 14 && std::memcmp(body.data, "JFIF", 5) == 0) jfif = true;
    if (marker == kApp14 && body.size >= 12 && std::memcmp(body.data, "Adobe", 5) == 0)
      adobe = true, transform = body.data[11];
  }
  bool ycc(const Frame& frame) const {
    if (frame.components == 1 || jfif) return true;
    if (adobe) return transform != 0;
    return !(frame.component[0].id == 'R' && frame.component[1].id == 'G' &&
             frame.component[2].id == 'B');
  }
};

}  // namespace

bool Tiles::parse(Bytes jpeg) {
  jpeg_ = jpeg;
  frame_ = {};
  header_.clear();
  const uint8_t* data = jpeg.data;
  size_t at = 2;
  Colours colours;
  bool plain = true;
  if (jpeg.size < 4 || data[0] != 0xFF || data[1] != kStart) return false;
  for (;;) {
    const size_t begin = at;
    if (jpeg.size - at < 4 || data[at] != 0xFF) return false;
    while (data[at + 1] == 0xFF)
      if (jpeg.size - ++at < 4) return false;
    const uint8_t marker = data[at + 1];
    const size_t length = word(data + at + 2), body = at + 4, end = at + 2 + length;
    if (length < 2 || end > jpeg.size) return false;
    at = end;
    switch (marker) {
      case kBaseline:
      case kExtended:
        if (frame_.width || !read_frame(data + body, length - 2, &frame_)) return false;
        frame_.size_at = body + 1;
        break;
      case kInterval:
        if (length != 4) return false;
        frame_.interval = word(data + body);
        continue;  // written anew
      case kScan:
        // All components in one scan.
        if (!frame_.width || length < 3 || data[body] != frame_.components) return false;
        header_.push_back({begin, end});
        frame_.scan = end;
        frame_.plain =
            read_scan({data + body, length - 2}, &frame_) && plain && colours.ycc(frame_);
        return true;
      case kQuantisation: plain &= read_factors({data + body, length - 2}, &frame_); break;
      case kHuffman: plain &= read_huffman({data + body, length - 2}, &frame_); break;
      case kApp0:
      case kApp14: colours.read_app(marker, {data + body, length - 2}); break;
      default:
        if ((marker >= kApp0 && marker <= kApp15) || marker == kComment) continue;
        return false;
    }
    header_.push_back({begin, end});
  }
}

bool Tiles::find_segments(size_t last) {
  const size_t mcus = static_cast<size_t>(frame_.columns) * frame_.rows;
  const size_t total = frame_.interval ? (mcus + frame_.interval - 1) / frame_.interval : 1;
  segments_.clear();
  segments_.push_back(frame_.scan);
  const uint8_t* const end = jpeg_.data + jpeg_.size;
  const uint8_t* at = jpeg_.data + frame_.scan;
  for (;;) {
    at = static_cast<const uint8_t*>(std::memchr(at, 0xFF, end - at));
    if (!at) break;
    const uint8_t* const first = at;
    while (at != end && *at == 0xFF) ++at;  // any number of them may stand before a marker
    if (at == end) break;
    const uint8_t marker = *at++;
    if (marker == 0) continue;
    const bool is_restart = kFirstRestart <= marker && marker < kFirstRestart + 8;
    const bool is_last = segments_.size() == last + 1;
    if (is_last && segments_.size() == total) {
      last_end_ = first - jpeg_.data;
      return !is_restart;
    }
    if (marker != kFirstRestart + (segments_.size() - 1) % 8) return false;
    if (is_last) {
      last_end_ = first - jpeg_.data;
      return true;
    }
    segments_.push_back(at - jpeg_.data);
  }
  last_end_ = jpeg_.size;  // a file may lack its end marker
  return segments_.size() == total && last + 1 == total;
}

Bytes Tiles::segment(size_t k) const {
  const size_t begin = segments_[k],
               end = k + 1 < segments_.size() ? segments_[k + 1] - 2 : last_end_;
  return {jpeg_.data + begin, end - begin};
}

// Only stuffed zeros are left out: find_segments has found no other marker.
Bytes Tiles::unstuffed(size_t k) {
  const Bytes from = segment(k);
  if (unstuffed_.size() < from.size + kSegmentPadding)
    unstuffed_.resize(from.size + kSegmentPadding);
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
    if (at < end) *to++ = 0xFF, ++at;  // else: the file ends within a pair
  }
  std::memset(to, 0, kSegmentPadding);
  return {unstuffed_.data(), static_cast<size_t>(to - unstuffed_.data())};
}

void Tiles::write_header(int width, int height) {
  stream_.assign({0xFF, kStart});
  for (const HeaderPart& part : header_) {
    if (part.end == frame_.scan)
      stream_.insert(stream_.end(),
                     {0xFF, kInterval, 0, 4, static_cast<uint8_t>(frame_.interval >> 8),
                      static_cast<uint8_t>(frame_.interval)});
    const size_t at = stream_.size();
    stream_.insert(stream_.end(), jpeg_.data + part.begin, jpeg_.data + part.end);
    if (part.begin < frame_.size_at && frame_.size_at < part.end) {
      uint8_t* size = stream_.data() + at + (frame_.size_at - part.begin);
      size[0] = static_cast<uint8_t>(height >> 8);
      size[1] = static_cast<uint8_t>(height);
      size[2] = static_cast<uint8_t>(width >> 8);
      size[3] = static_cast<uint8_t>(width);
    }
  }
}

bool Tiles::splice(const Crop& crop) {
  const Frame& f = frame_;
  // Other intervals than divisors of a row: a segment read only in part would not show that the
  // header lies about it.
  if (f.interval == 0 || f.columns % f.interval || jpeg_.size > UINT32_MAX) return false;
  // Where chroma has fewer samples, a pixel depends on the sample beside its own as well, 2 pixels
  // away.
  const int margin_x = f.max_h > 1 ? 2 : 0, margin_y = f.max_v > 1 ? 2 : 0;
  int left = std::max(0, crop.x - margin_x) / f.mcu_width;
  int right = std::min(f.columns, round_up(crop.x + crop.width + margin_x, f.mcu_width));
  int top = std::max(0, crop.y - margin_y) / f.mcu_height;
  int bottom = std::min(f.rows, round_up(crop.y + crop.height + margin_y, f.mcu_height));

  left = left / f.interval * f.interval;
  right = round_up(right, f.interval) * f.interval;
  // libjpeg upsamples images of up to 2 chroma columns in another way: an edge tile may be as
  // narrow as that.
  const int width = std::min(f.width, right * f.mcu_width) - left * f.mcu_width;
  if (width < 4 * f.max_h) left = std::max(0, left - f.interval);
  if (left == 0 && right == f.columns && top == 0)
    return false;  // nothing to leave out but the end

  const auto segment = [&](int row, int column) {
    return (static_cast<size_t>(row) * f.columns + column) / f.interval;
  };
  const size_t last = segment(bottom - 1, right - 1);
  if (!find_segments(last)) return false;

  x_ = left * f.mcu_width;
  y_ = top * f.mcu_height;
  write_header(std::min(f.width, right * f.mcu_width) - x_,
               std::min(f.height, bottom * f.mcu_height) - y_);
  unsigned restarts = 0;
  const auto copy = [&](size_t from, size_t to) {  // segments [from, to], which lie side by side
    const size_t begin = segments_[from], end = to == last ? last_end_ : segments_[to + 1] - 2;
    const size_t shift = stream_.size();
    stream_.insert(stream_.end(), jpeg_.data + begin, jpeg_.data + end);
    for (size_t k = from + 1; k <= to; ++k)
      stream_[shift + segments_[k] - begin - 1] =
          static_cast<uint8_t>(kFirstRestart + restarts++ % 8);
  };
  for (int row = top; row < bottom; ++row) {
    if (row > top)
      stream_.insert(stream_.end(), {0xFF, static_cast<uint8_t>(kFirstRestart + restarts++ % 8)});
    copy(segment(row, left), segment(row, right - 1));
  }
  data_end_ = stream_.size();
  stream_.insert(stream_.end(), {0xFF, kEnd});
  stream_.resize(stream_.size() + kPadding);
  return true;
}

}  // namespace matryoshka
