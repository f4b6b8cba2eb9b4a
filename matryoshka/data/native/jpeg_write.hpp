// JPEG writing: from pixels, or from the coefficients of another JPEG.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "bytes.hpp"
#include "proof.hpp"
#include "recode.hpp"
#include "status.hpp"
#include "tiles.hpp"

namespace matryoshka {

// The restart interval, in MCUs, that cuts an MCU row into equal tiles about `tile` pixels wide: a
// divisor of the MCUs in the row. tile = 0 gives 0, no markers.
unsigned restart_interval(int image_width, int mcu_width, int tile);

class JpegWriter {
 public:
  JpegWriter();
  ~JpegWriter();
  JpegWriter(const JpegWriter&) = delete;
  JpegWriter& operator=(const JpegWriter&) = delete;

  // Write baseline 4:2:0 with the standard Huffman tables, as most JPEG software at this quality.
  Status encode(const uint8_t* rgb, int width, int height, int quality, int tile);
  // Write the coefficients of a baseline JPEG, unchanged, without its metadata. The result is read
  // again and compared with the source: not_copied if anything differs.
  Status transcode(Bytes jpeg, int tile);
  // The last image; valid until the next one.
  Bytes result() const { return result_; }

 private:
  struct State;

  Status copy_proven(Bytes jpeg, int tile);

  std::unique_ptr<State> state_;
  Tiles tiles_;
  Recoder recoder_;
  Proof proof_;
  Bytes result_{};
};

}  // namespace matryoshka
