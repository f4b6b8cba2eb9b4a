// JPEG decoding with libjpeg-turbo. Bad data never throws: every problem is a Status.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "bytes.hpp"
#include "status.hpp"

namespace matryoshka {

// Decodes any number of images, one after the other, without image memory between them.
class JpegDecoder {
 public:
  JpegDecoder();
  ~JpegDecoder();
  JpegDecoder(const JpegDecoder&) = delete;
  JpegDecoder& operator=(const JpegDecoder&) = delete;

  // Read the header. The data must stay readable until close(). checked: it is known that no
  // has_filled_stuffing.
  Status open(Bytes jpeg, bool checked = false);
  int width() const;
  int height() const;
  int components() const;

  // After open: prepare to decode RGB rows; colour_space if libjpeg cannot convert to RGB. halve:
  // decode at half the size, rounded up. Rows have at least the columns [x, x + width) of that
  // image, with the same pixels as a whole decode; their first column is row_x().
  Status start(int x, int width, bool halve = false);
  int row_x() const;
  int row_width() const;
  // After start: skip the rows above `y`.
  Status skip_to(int y, uint8_t* scratch_row);
  // Decode the next row, 3 * row_width() bytes.
  Status read_row(uint8_t* row);
  // Whether data before `end` is left over although all blocks are decoded: blocks were lost.
  bool has_unread_data(const uint8_t* end) const;

  // End the image after any row. Data behind the last row is never read.
  void close();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace matryoshka
