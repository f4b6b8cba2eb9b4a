// Marker codes of ITU-T T.81 (B.1.1.3, table B.1), named as in libjpeg's jdmarker.c. In a file, a
// 0xFF byte precedes each.
#pragma once

#include <cstdint>

#include "bytes.hpp"

namespace matryoshka {

enum Marker : uint8_t {
  M_SOF0 = 0xC0,  // start of frame: baseline DCT
  M_SOF1 = 0xC1,  // extended sequential DCT, Huffman coding
  M_DHT = 0xC4,   // define Huffman tables
  M_RST0 = 0xD0,  // restart, numbered modulo 8 up to M_RST7
  M_RST7 = 0xD7,
  M_SOI = 0xD8,  // start of image
  M_EOI = 0xD9,  // end of image
  M_SOS = 0xDA,  // start of scan
  M_DQT = 0xDB,  // define quantisation tables
  M_DRI = 0xDD,  // define restart interval
  M_APP0 = 0xE0,
  M_APP14 = 0xEE,
  M_APP15 = 0xEF,
  M_COM = 0xFE,  // comment
};

// The code of the n-th restart marker of a scan.
constexpr uint8_t restart_marker(int64_t n) { return static_cast<uint8_t>(M_RST0 + n % 8); }

// Whether a scan has fill bytes before a stuffed zero, 0xFF 0xFF 0x00. T.81, B.1.1.2 allows them
// before markers only. libjpeg's fast Huffman decoder takes them for a marker and leaves the block
// to the slow one, which takes them for one byte and keeps coefficients of the first attempt:
// pixels then depend on how much data follows.
bool has_filled_stuffing(Bytes jpeg);

}  // namespace matryoshka
