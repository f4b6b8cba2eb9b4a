#include "jpeg_markers.hpp"

#include <cstring>

namespace matryoshka {

bool has_filled_stuffing(Bytes jpeg) {
  const uint8_t* const end = jpeg.data + jpeg.size;
  const uint8_t* at = jpeg.data;
  bool in_scan = false;
  while (at < end) {
    at = static_cast<const uint8_t*>(std::memchr(at, 0xFF, end - at));
    if (!at) return false;
    const uint8_t* const first = at;
    while (at < end && *at == 0xFF) ++at;
    if (at == end) return false;
    const uint8_t marker = *at++;
    if (marker == 0) {
      if (in_scan && at - first > 2) return true;
      continue;
    }
    if (marker == M_EOI) return false;
    if (marker <= 1 || (M_RST0 <= marker && marker <= M_SOI)) continue;  // these have no segment
    if (end - at < 2) return false;
    const ptrdiff_t length = at[0] << 8 | at[1];
    if (length > end - at) return false;
    at += length;
    in_scan = marker == M_SOS;
  }
  return false;
}

}  // namespace matryoshka
