// Errors and input of libjpeg. It reports errors by longjmp: each function with a setjmp is
// therefore static, works on a plain struct, and has no object with a destructor; no C++ exception
// passes through libjpeg.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdio>

#include <jpeglib.h>

#include <jerror.h>

#include "status.hpp"

namespace matryoshka {

struct JpegErrors {
  jpeg_error_mgr base;  // must be first: libjpeg has a pointer to it
  jmp_buf escape;
  Status status;
};

[[noreturn]] inline void jpeg_fail(j_common_ptr info, Status status) {
  JpegErrors* errors = reinterpret_cast<JpegErrors*>(info->err);
  errors->status = status;
  longjmp(errors->escape, 1);
}

jpeg_error_mgr* install(JpegErrors* errors);

// A block of memory, followed by endless EOI markers. A scan that lacks data meets the marker and
// warns; a file that lacks only its EOI marker still decodes.
struct JpegSource {
  jpeg_source_mgr base;
  bool exhausted;  // libjpeg has read beyond the data
};

void install(JpegSource* source, j_decompress_ptr info);
void set_data(JpegSource* source, const unsigned char* data, size_t size);

// libjpeg keeps its tables from one image to the next, for abbreviated streams. Here an image that
// lacks a table must not be decoded with that of another image. Call this before reading the
// header; libjpeg then fails for a missing Huffman table.
void clear_tables(j_decompress_ptr info);
// Call this after the first scan has begun. False for a missing quantisation table, and for one
// with a zero, which T.81, B.2.4.1 forbids.
bool has_quant_tables(const jpeg_decompress_struct& info);

// Progressive decoding and transcoding keep all coefficients in memory.
constexpr long kMaxCoefficientBytes = 512L << 20;

}  // namespace matryoshka
