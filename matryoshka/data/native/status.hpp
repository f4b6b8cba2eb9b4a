// Errors of one sample. The numbers are an interface: decode_batch returns them as uint8.
#pragma once

#include <cstdint>

namespace matryoshka {

enum class Status : uint8_t {
  ok,
  corrupt,
  not_jpeg,
  wrong_dimensions,
  wrong_raw_size,
  unknown_mode,
  outside_file,
  bad_crop,
  colour_space,
  too_large,
  not_baseline,
  not_copied,
  count
};

inline const char* message(Status status) {
  switch (status) {
    case Status::ok: return "ok";
    case Status::corrupt: return "truncated or corrupt JPEG data";
    case Status::not_jpeg: return "not a JPEG";
    case Status::wrong_dimensions: return "JPEG dimensions differ from the metadata";
    case Status::wrong_raw_size: return "raw size does not match its dimensions";
    case Status::unknown_mode: return "unknown mode";
    case Status::outside_file: return "outside the file";
    case Status::bad_crop: return "bad crop";
    case Status::colour_space: return "unsupported colour space (CMYK)";
    case Status::too_large: return "image too large";
    case Status::not_baseline: return "not a baseline JPEG";
    case Status::not_copied: return "a copy would have other coefficients";
    case Status::count: break;
  }
  return nullptr;
}

// Larger images are refused before memory is allocated for them.
constexpr int64_t kMaxPixels = int64_t{1} << 28;

}  // namespace matryoshka
