#include "sample.hpp"

#include <cstring>
#include <new>
#include <vector>

#include "jpeg.hpp"
#include "resample.hpp"

namespace matryoshka {
namespace {

// What a thread needs for any number of samples.
struct Workspace {
  JpegDecoder decoder;
  Resampler resampler;
  std::vector<uint8_t> rows;
};

Workspace& workspace() {
  thread_local Workspace instance;
  return instance;
}

class OpenJpeg {
 public:
  OpenJpeg(JpegDecoder& decoder, Bytes jpeg) : decoder_(decoder), status(decoder.open(jpeg.data, jpeg.size)) {}
  ~OpenJpeg() { decoder_.close(); }
  OpenJpeg(const OpenJpeg&) = delete;
  OpenJpeg& operator=(const OpenJpeg&) = delete;

 private:
  JpegDecoder& decoder_;

 public:
  const Status status;
};

bool fits(const Crop& crop, int32_t width, int32_t height) {
  return crop.x >= 0 && crop.y >= 0 && crop.width > 0 && crop.height > 0 && crop.width <= width &&
         crop.height <= height && crop.x <= width - crop.width && crop.y <= height - crop.height;
}

Status check(Bytes file, const Sample& sample) {
  const bool raw = sample.mode == static_cast<uint8_t>(Mode::raw);
  if (!raw && sample.mode != static_cast<uint8_t>(Mode::jpeg)) return Status::unknown_mode;
  if (sample.offset > file.size || sample.size > file.size - sample.offset) return Status::outside_file;
  const int64_t pixels = int64_t{sample.width} * sample.height;
  const bool negative = sample.width < 0 || sample.height < 0;
  if (!negative && pixels > kMaxPixels) return Status::too_large;
  if (raw && (negative || sample.size != 3 * static_cast<uint64_t>(pixels))) return Status::wrong_raw_size;
  return fits(sample.crop, sample.width, sample.height) ? Status::ok : Status::bad_crop;
}

void begin(Resampler& resampler, const Crop& crop, Image out) {
  resampler.begin(crop.width, crop.height, crop.flip != 0, out.pixels, out.height, out.width);
}

void decode_raw(const uint8_t* pixels, int32_t width, const Crop& crop, Image out) {
  Resampler& resampler = workspace().resampler;
  begin(resampler, crop, out);
  const size_t stride = 3 * static_cast<size_t>(width);
  const uint8_t* row = pixels + stride * crop.y + 3 * static_cast<size_t>(crop.x);
  for (int32_t y = 0; y < crop.height; ++y, row += stride) resampler.push(row);
}

Status decode_jpeg_crop(Bytes bytes, const Sample& sample, Image out) {
  auto& [decoder, resampler, rows] = workspace();
  const OpenJpeg jpeg(decoder, bytes);
  if (jpeg.status != Status::ok) return jpeg.status;
  if (decoder.width() != sample.width || decoder.height() != sample.height) return Status::wrong_dimensions;
  if (const Status status = decoder.start(); status != Status::ok) return status;

  const Crop& crop = sample.crop;
  begin(resampler, crop, out);
  const size_t stride = 3 * static_cast<size_t>(sample.width), left = 3 * static_cast<size_t>(crop.x);
  rows.resize(2 * stride);  // the resampler looks back one row
  for (int32_t y = 0; y < crop.y + crop.height; ++y) {
    uint8_t* row = rows.data() + (y & 1) * stride;
    if (const Status status = decoder.read_row(row); status != Status::ok) return status;
    if (y >= crop.y) resampler.push(row + left);
  }
  return Status::ok;
}

Status decode_checked(Bytes file, const Sample& sample, Image out) {
  if (const Status status = check(file, sample); status != Status::ok) return status;
  const Bytes bytes{file.data + sample.offset, static_cast<size_t>(sample.size)};
  if (sample.mode == static_cast<uint8_t>(Mode::jpeg)) return decode_jpeg_crop(bytes, sample, out);
  decode_raw(bytes.data, sample.width, sample.crop, out);
  return Status::ok;
}

}  // namespace

Status decode_sample(Bytes file, const Sample& sample, Image out) noexcept {
  Status status;
  try {
    status = decode_checked(file, sample, out);
  } catch (const std::bad_alloc&) {  // a row of this image does not fit into memory
    status = Status::too_large;
  }
  if (status != Status::ok) std::memset(out.pixels, 0, 3 * static_cast<size_t>(out.height) * out.width);
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
  if (decoder.width() != out.width || decoder.height() != out.height) return Status::wrong_dimensions;
  if (const Status status = decoder.start(); status != Status::ok) return status;
  const size_t stride = 3 * static_cast<size_t>(out.width);
  for (int y = 0; y < out.height; ++y)
    if (const Status status = decoder.read_row(out.pixels + y * stride); status != Status::ok) return status;
  return Status::ok;
}

void resize_image(const uint8_t* pixels, int height, int width, Image out) {
  decode_raw(pixels, width, {0, 0, width, height, 0}, out);
}

}  // namespace matryoshka
