// libjpeg reports errors by longjmp. Each function with a setjmp is therefore static, works on a
// plain struct, and owns nothing that has a destructor; one call of libjpeg is never left through a
// C++ exception.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdio>

#include <jpeglib.h>

#include <jerror.h>

#include "status.hpp"

namespace matryoshka {

struct JpegErrors {
  jpeg_error_mgr base;  // first: libjpeg knows only this part
  jmp_buf escape;
  Status status;
};

[[noreturn]] inline void jpeg_fail(j_common_ptr info, Status status) {
  JpegErrors* errors = reinterpret_cast<JpegErrors*>(info->err);
  errors->status = status;
  longjmp(errors->escape, 1);
}

jpeg_error_mgr* install(JpegErrors* errors);

// The source: a block of memory, and behind it end-of-image markers without end. A scan that lacks
// data then runs into the marker and says so, while a file that lacks nothing but its end marker
// still decodes.
struct JpegSource {
  jpeg_source_mgr base;
  bool ran_dry;
};

void install(JpegSource* source, j_decompress_ptr info);
void refill(JpegSource* source, const unsigned char* data, size_t size);

// libjpeg keeps its tables from one image to the next, for streams that come without. Here every
// image stands alone: one that lacks a table must not be decoded with whichever was there before.
// Before the header is read, and (for quantisation; a missing Huffman table is an error of
// libjpeg's then) after the first scan has begun:
void forget_tables(j_decompress_ptr info);
bool has_tables(const jpeg_decompress_struct& info);

// A progressive file keeps all coefficients in memory; so does one that is transcoded.
constexpr long kMaxCoefficientBytes = 512L << 20;

}  // namespace matryoshka
