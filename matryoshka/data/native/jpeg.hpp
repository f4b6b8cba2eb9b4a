// JPEG through libjpeg-turbo's libjpeg API. Nothing here throws for bad data: every problem is a
// Status.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "bytes.hpp"
#include "status.hpp"

namespace matryoshka {

// One decoder serves any number of images, one after the other, and holds no image memory between
// them.
class JpegDecoder {
 public:
  JpegDecoder();
  ~JpegDecoder();
  JpegDecoder(const JpegDecoder&) = delete;
  JpegDecoder& operator=(const JpegDecoder&) = delete;

  // Reads the header. The data has to stay readable until close().
  Status open(Bytes jpeg);
  int width() const;
  int height() const;
  int components() const;

  // After open: prepares RGB rows, refuses what cannot become RGB. With `halve` the image is made
  // at half its size, rounded up. Rows hold at least the columns [x, x + width) of that image, with
  // the pixels that a whole decode gives them; the first column is row_x().
  Status start(int x, int width, bool halve = false);
  int row_x() const;
  int row_width() const;
  // After start: leaves out the rows above `y`, as cheaply as possible.
  Status skip_to(int y, uint8_t* scratch_row);
  // The next row of 3 * row_width() bytes, at most as many as the image has.
  Status read_row(uint8_t* row);
  // True if all blocks are decoded, and data before `end` was not needed for them: blocks were
  // lost.
  bool left_data_before(const uint8_t* end) const;

  // Ends the image, wherever it is. Data behind the last row read is never looked at.
  void close();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace matryoshka
