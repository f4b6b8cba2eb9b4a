// Making JPEGs with libjpeg-turbo: from pixels, or from the coefficients of another JPEG.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "bytes.hpp"
#include "recode.hpp"
#include "status.hpp"
#include "tiles.hpp"

namespace matryoshka {

// The restart interval, in MCUs, that cuts a row of MCUs into equal tiles about `tile` pixels wide:
// a divisor of the MCUs in the row. 0, no markers, for tile = 0.
unsigned restart_interval(int image_width, int mcu_width, int tile);

class JpegWriter {
 public:
  JpegWriter();
  ~JpegWriter();
  JpegWriter(const JpegWriter&) = delete;
  JpegWriter& operator=(const JpegWriter&) = delete;

  // Baseline, 4:2:0, the standard Huffman tables: what most JPEG software writes at the same
  // quality.
  Status encode(const uint8_t* rgb, int width, int height, int quality, int tile);
  // The coefficients of a baseline JPEG, unchanged, without its metadata.
  Status transcode(Bytes jpeg, int tile);
  // The last image, until the next one.
  Bytes result() const { return result_; }

 private:
  struct State;
  std::unique_ptr<State> state_;
  Tiles tiles_;
  Recoder recoder_;
  Bytes result_{};
};

}  // namespace matryoshka
