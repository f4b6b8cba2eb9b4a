// Loading of one sample: check its place in the file, decode it, resample the crop into its slot of
// the batch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bytes.hpp"
#include "image.hpp"
#include "status.hpp"
#include "view.hpp"

namespace matryoshka {

enum class Mode : uint8_t {
  jpeg = 0,
  raw = 1
};  // as in the file format; raw is RGB, [height, width, 3]

struct Sample {
  uint64_t offset, size;
  uint8_t mode;
  int32_t width, height;
};

// All numbers of the sample and of its views, one or more, are checked before use. After a failure
// all slots are zero. exact: the same pixels as from resampling the whole decoded image; otherwise
// the fastest way, for training.
Status decode_sample(Bytes file, const Sample& sample, bool exact, const View* views,
                     size_t count) noexcept;

// The size of a whole JPEG, from its header.
struct JpegSize {
  int width, height, components;
};
Status read_jpeg_size(Bytes jpeg, JpegSize* size);
// Its pixels, into an image of exactly this size.
Status decode_jpeg(Bytes jpeg, Image out);

void resize_image(const uint8_t* pixels, int height, int width, Image out);

}  // namespace matryoshka
