#include "sample.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "baseline.hpp"
#include "jpeg.hpp"
#include "resample.hpp"
#include "tiles.hpp"

namespace matryoshka {
namespace {

// The decoders and buffers of one thread, reused for all its samples.
struct Workspace {
  Tiles tiles;
  BaselineDecoder baseline;
  PlaneResampler plane_resampler;
  JpegDecoder decoder;
  std::vector<Resampler> resamplers = std::vector<Resampler>(1);  // one for each view
  std::vector<Crop> crops;
  std::vector<uint8_t> rows;
};

Workspace& workspace() {
  thread_local Workspace instance;
  return instance;
}

// Opens an image and closes it at the end of the scope.
class OpenJpeg {
 public:
  OpenJpeg(JpegDecoder& decoder, Bytes jpeg, bool checked = false)
      : status(decoder.open(jpeg, checked)), decoder_(decoder) {}
  ~OpenJpeg() { decoder_.close(); }
  OpenJpeg(const OpenJpeg&) = delete;
  OpenJpeg& operator=(const OpenJpeg&) = delete;

  const Status status;

 private:
  JpegDecoder& decoder_;
};

bool is_inside(const Crop& crop, int32_t width, int32_t height) {
  return crop.x >= 0 && crop.y >= 0 && crop.width > 0 && crop.height > 0 && crop.width <= width &&
         crop.height <= height && crop.x <= width - crop.width && crop.y <= height - crop.height;
}

Status validate(Bytes file, const Sample& sample, const View* views, size_t count) {
  const bool raw = sample.mode == static_cast<uint8_t>(Mode::raw);
  if (!raw && sample.mode != static_cast<uint8_t>(Mode::jpeg)) return Status::unknown_mode;
  if (sample.offset > file.size || sample.size > file.size - sample.offset)
    return Status::outside_file;
  const int64_t pixels = int64_t{sample.width} * sample.height;
  const bool negative = sample.width < 0 || sample.height < 0;
  if (!negative && pixels > kMaxPixels) return Status::too_large;
  if (raw && (negative || sample.size != 3 * static_cast<uint64_t>(pixels)))
    return Status::wrong_raw_size;
  for (size_t v = 0; v < count; ++v)
    if (!is_inside(views[v].crop, sample.width, sample.height)) return Status::bad_crop;
  return Status::ok;
}

void decode_raw(const uint8_t* pixels, int32_t width, const Crop& crop, Image out) {
  Resampler& resampler = workspace().resamplers[0];
  resampler.begin(crop, 1, out);
  const size_t stride = 3 * static_cast<size_t>(width);
  const uint8_t* row = pixels + stride * crop.y + 3 * static_cast<size_t>(crop.x);
  for (int32_t y = 0; y < crop.height; ++y, row += stride) resampler.push(row);
}

// Decode the rows of w.crops, in coordinates of the open image, and resample each crop.
Status push_rows(bool halve) {
  Workspace& w = workspace();
  int32_t left = INT32_MAX;
  int32_t top = INT32_MAX;
  int32_t right = 0;
  int32_t bottom = 0;
  int window = 0;
  for (size_t v = 0; v < w.crops.size(); ++v) {
    const Crop& crop = w.crops[v];
    left = std::min(left, crop.x);
    top = std::min(top, crop.y);
    right = std::max(right, crop.x + crop.width);
    bottom = std::max(bottom, crop.y + crop.height);
    window = std::max(window, w.resamplers[v].window() + 1);
  }
  if (const Status status = w.decoder.start(left, right - left, halve); status != Status::ok)
    return status;
  const size_t stride = 3 * static_cast<size_t>(w.decoder.row_width());
  if (w.rows.size() < window * stride) w.rows.resize(window * stride);
  if (const Status status = w.decoder.skip_to(top, w.rows.data()); status != Status::ok)
    return status;
  for (int32_t y = top; y < bottom; ++y) {
    uint8_t* row = w.rows.data() + y % window * stride;
    if (const Status status = w.decoder.read_row(row); status != Status::ok) return status;
    for (size_t v = 0; v < w.crops.size(); ++v) {
      const Crop& crop = w.crops[v];
      if (y < crop.y || y >= crop.y + crop.height) continue;
      w.resamplers[v].push(row + 3 * static_cast<size_t>(crop.x - w.decoder.row_x()));
    }
  }
  return Status::ok;
}

// From the planes that w.baseline has decoded.
bool resample_planes(const View& view) {
  Workspace& w = workspace();
  const PlaneView* planes = w.baseline.planes(view.crop);
  return w.plane_resampler.resample(planes, w.baseline.num_planes(), view.crop, view.out);
}

// Whether libjpeg decodes at half the size: its inverse DCT can make 4 x 4 pixels of a block.
bool is_halved(const View& view, bool exact) {
  return !exact && view.crop.width >= 2 * int64_t{view.out.width} &&
         view.crop.height >= 2 * int64_t{view.out.height};
}

// The pixels of the half-size image that are in the crop, if only in part.
Crop halved(const Crop& crop) {
  const int32_t right = (crop.x + crop.width + 1) / 2;
  const int32_t bottom = (crop.y + crop.height + 1) / 2;
  return {crop.x / 2, crop.y / 2, right - crop.x / 2, bottom - crop.y / 2, crop.flip};
}

// Whether libjpeg can decode the views at once: at one size, and without tiles, which every crop
// has for itself.
bool share_rows(const View* views, size_t count, bool exact, bool parsed) {
  if (parsed && workspace().tiles.frame().restart_interval) return false;
  for (size_t v = 1; v < count; ++v)
    if (is_halved(views[v], exact) != is_halved(views[0], exact)) return false;
  return true;
}

// The views from a whole JPEG; spliced: from the stream that w.tiles has made of it for one view.
Status decode_stream(Bytes bytes, const Sample& sample, bool exact, bool spliced, const View* views,
                     size_t count) {
  Workspace& w = workspace();
  w.crops.clear();
  for (size_t v = 0; v < count; ++v) w.crops.push_back(views[v].crop);
  if (spliced) {
    w.crops[0].x -= w.tiles.x();
    w.crops[0].y -= w.tiles.y();
  }
  // The segments of a spliced stream are those that Tiles::find_segments has looked at.
  const OpenJpeg jpeg(w.decoder, bytes, spliced);
  if (jpeg.status != Status::ok) return jpeg.status;
  if (!spliced && (w.decoder.width() != sample.width || w.decoder.height() != sample.height))
    return Status::wrong_dimensions;

  const bool halve = is_halved(views[0], exact);
  if (w.resamplers.size() < count) w.resamplers.resize(count);
  for (size_t v = 0; v < count; ++v) {
    w.resamplers[v].begin(w.crops[v], halve ? 2 : 1, views[v].out);
    if (halve) w.crops[v] = halved(w.crops[v]);
  }
  if (const Status status = push_rows(halve); status != Status::ok) return status;
  if (spliced && w.decoder.has_unread_data(w.tiles.data_end())) return Status::corrupt;
  return Status::ok;
}

// With libjpeg; several views only if they share_rows. parsed: w.tiles has parsed the JPEG.
Status decode_rows(Bytes bytes, const Sample& sample, bool exact, bool parsed, const View* views,
                   size_t count) {
  Tiles& tiles = workspace().tiles;
  if (count == 1 && parsed && tiles.splice(views[0].crop) &&
      decode_stream(tiles.stream(), sample, exact, true, views, 1) == Status::ok)
    return Status::ok;
  // Also after damage: of a few bytes before a restart marker, libjpeg notices those that it has
  // not read ahead. A crop must not fail where the whole image is accepted.
  return decode_stream(bytes, sample, exact, false, views, count);
}

Status decode_jpeg_views(Bytes bytes, const Sample& sample, bool exact, const View* views,
                         size_t count) {
  Workspace& w = workspace();
  const bool parsed = w.tiles.parse(bytes);
  if (parsed) {
    const Frame& frame = w.tiles.frame();
    if (frame.width != sample.width || frame.height != sample.height)
      return Status::wrong_dimensions;
  }
  // The fastest way: through planes, with one decode for all views, and where that fails one for
  // each. Where this fails, too, libjpeg gets the image: it tolerates some damage and classifies
  // the rest.
  const bool planes = parsed && !exact && w.baseline.accepts(w.tiles);
  const auto decode = [&](const View* first, size_t n) {
    return planes && w.baseline.decode(w.tiles, first, n) == Status::ok;
  };
  const bool decoded = decode(views, count);
  if (!planes && count > 1 && share_rows(views, count, exact, parsed) &&
      decode_rows(bytes, sample, exact, parsed, views, count) == Status::ok)
    return Status::ok;
  for (const View* view = views; view < views + count; ++view) {
    if ((decoded || (count > 1 && decode(view, 1))) && resample_planes(*view)) continue;
    const Status status = decode_rows(bytes, sample, exact, parsed, view, 1);
    if (status != Status::ok) return status;
  }
  return Status::ok;
}

Status decode_checked(Bytes file, const Sample& sample, bool exact, const View* views,
                      size_t count) {
  if (const Status status = validate(file, sample, views, count); status != Status::ok)
    return status;
  const Bytes bytes{file.data + sample.offset, static_cast<size_t>(sample.size)};
  if (sample.mode == static_cast<uint8_t>(Mode::jpeg))
    return decode_jpeg_views(bytes, sample, exact, views, count);
  for (const View* view = views; view < views + count; ++view)
    decode_raw(bytes.data, sample.width, view->crop, view->out);
  return Status::ok;
}

}  // namespace

Status decode_sample(Bytes file, const Sample& sample, bool exact, const View* views,
                     size_t count) noexcept {
  Status status;
  try {
    status = decode_checked(file, sample, exact, views, count);
  } catch (const std::bad_alloc&) {  // a row of this image does not fit into memory
    status = Status::too_large;
  }
  if (status != Status::ok) {
    for (const View* view = views; view < views + count; ++view) {
      const Image& out = view->out;
      std::memset(out.pixels, 0, 3 * static_cast<size_t>(out.height) * out.width);
    }
  }
  return status;
}

Status read_jpeg_size(Bytes bytes, JpegSize* size) {
  JpegDecoder& decoder = workspace().decoder;
  const OpenJpeg jpeg(decoder, bytes);
  if (jpeg.status == Status::ok) *size = {decoder.width(), decoder.height(), decoder.components()};
  return jpeg.status;
}

Status decode_jpeg(Bytes bytes, Image out) {
  JpegDecoder& decoder = workspace().decoder;
  const OpenJpeg jpeg(decoder, bytes);
  if (jpeg.status != Status::ok) return jpeg.status;
  if (decoder.width() != out.width || decoder.height() != out.height)
    return Status::wrong_dimensions;
  if (const Status status = decoder.start(0, out.width); status != Status::ok) return status;
  const size_t stride = 3 * static_cast<size_t>(out.width);
  for (int y = 0; y < out.height; ++y)
    if (const Status status = decoder.read_row(out.pixels + y * stride); status != Status::ok)
      return status;
  return Status::ok;
}

void resize_image(const uint8_t* pixels, int height, int width, Image out) {
  decode_raw(pixels, width, {0, 0, width, height, 0}, out);
}

}  // namespace matryoshka
