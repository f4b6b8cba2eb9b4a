// JPEG through libjpeg-turbo's libjpeg API. Nothing here throws for bad data: every problem is a Status.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "status.hpp"

namespace matryoshka {

// One decoder serves any number of images, one after the other, and holds no image memory between them.
class JpegDecoder {
 public:
  JpegDecoder();
  ~JpegDecoder();
  JpegDecoder(const JpegDecoder&) = delete;
  JpegDecoder& operator=(const JpegDecoder&) = delete;

  // Reads the header. The data has to stay readable until close().
  Status open(const uint8_t* data, size_t size);
  int width() const;
  int height() const;
  int components() const;

  // After open: prepares RGB rows, refuses what cannot become RGB.
  Status start();
  // After start, at most height() times: the next row of 3 * width() bytes.
  Status read_row(uint8_t* row);

  // Ends the image, wherever it is. Data behind the last row read is never looked at.
  void close();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Baseline, 4:2:0, the standard Huffman tables: what most JPEG software writes at the same quality.
class JpegEncoder {
 public:
  JpegEncoder();
  ~JpegEncoder();
  JpegEncoder(const JpegEncoder&) = delete;
  JpegEncoder& operator=(const JpegEncoder&) = delete;

  Status encode(const uint8_t* rgb, int width, int height, int quality);
  // The last image, until the next one.
  const uint8_t* data() const;
  size_t size() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace matryoshka
