// libjpeg reports errors by longjmp. Each function with a setjmp is therefore static, works on a plain struct,
// and owns nothing that has a destructor; one call of libjpeg is never left through a C++ exception.
#include "jpeg.hpp"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <type_traits>

#include <jpeglib.h>

#include <jerror.h>

namespace matryoshka {
namespace {

// Progressive files keep all coefficients in memory and may come with any number of scans.
constexpr long kMaxCoefficientBytes = 512L << 20;
constexpr int kMaxScans = 1000;

struct Errors {
  jpeg_error_mgr base;  // first: libjpeg knows only this part
  jmp_buf escape;
  Status status;
};

[[noreturn]] void fail(j_common_ptr info, Status status) {
  Errors* errors = reinterpret_cast<Errors*>(info->err);
  errors->status = status;
  longjmp(errors->escape, 1);
}

void error_exit(j_common_ptr info) {
  switch (info->err->msg_code) {
    case JERR_NO_SOI:
      fail(info, Status::not_jpeg);
    case JERR_BAD_J_COLORSPACE:
    case JERR_CONVERSION_NOTIMPL:
      fail(info, Status::colour_space);
    case JERR_IMAGE_TOO_BIG:
    case JERR_WIDTH_OVERFLOW:
    case JERR_OUT_OF_MEMORY:
    case JERR_NO_BACKING_STORE:
      fail(info, Status::too_large);
    default:
      fail(info, Status::corrupt);
  }
}

// libjpeg goes on after a warning, with grey or garbled pixels where it means damage.
void emit_message(j_common_ptr info, int level) {
  if (level >= 0) return;
  switch (info->err->msg_code) {
    case JWRN_ADOBE_XFORM:
    case JWRN_JFIF_MAJOR:
    case JWRN_TOO_MUCH_DATA:
      return;
    case JWRN_EXTRANEOUS_DATA: {
      // Padding before a header marker is harmless; bytes left over before a restart marker are lost blocks.
      const int marker = info->err->msg_parm.i[1];
      if (marker < JPEG_RST0 || marker > JPEG_RST0 + 7) return;
      break;
    }
  }
  fail(info, Status::corrupt);
}

void output_message(j_common_ptr) {}

jpeg_error_mgr* install(Errors* errors) {
  jpeg_std_error(&errors->base);
  errors->base.error_exit = error_exit;
  errors->base.emit_message = emit_message;
  errors->base.output_message = output_message;
  return &errors->base;
}

// The source: a block of memory, and behind it end-of-image markers without end. A scan that lacks data then runs
// into the marker and says so, while a file that lacks nothing but its end marker still decodes.
struct Source {
  jpeg_source_mgr base;
  bool ran_dry;
};

void source_ready(j_decompress_ptr) {}

boolean source_fill(j_decompress_ptr info) {
  static const JOCTET end[2] = {0xFF, JPEG_EOI};
  reinterpret_cast<Source*>(info->src)->ran_dry = true;
  info->src->next_input_byte = end;
  info->src->bytes_in_buffer = sizeof end;
  return TRUE;
}

void source_skip(j_decompress_ptr info, long count) {
  if (count <= 0) return;
  if (static_cast<size_t>(count) > info->src->bytes_in_buffer) {
    source_fill(info);
  } else {
    info->src->next_input_byte += count;
    info->src->bytes_in_buffer -= count;
  }
}

void limit_scans(j_common_ptr info) {
  if (reinterpret_cast<j_decompress_ptr>(info)->input_scan_number > kMaxScans) fail(info, Status::corrupt);
}

// The destination: one block of memory that grows and is kept for the next image.
struct Destination {
  jpeg_destination_mgr base;
  JOCTET* block;
  size_t capacity, size;
};

boolean destination_grow(j_compress_ptr info) {
  Destination* destination = reinterpret_cast<Destination*>(info->dest);
  const size_t used = destination->capacity, capacity = used ? 2 * used : size_t{1} << 16;
  void* block = std::realloc(destination->block, capacity);
  if (!block) fail(reinterpret_cast<j_common_ptr>(info), Status::too_large);
  destination->block = static_cast<JOCTET*>(block);
  destination->capacity = capacity;
  destination->base.next_output_byte = destination->block + used;
  destination->base.free_in_buffer = capacity - used;
  return TRUE;
}

void destination_begin(j_compress_ptr info) {
  Destination* destination = reinterpret_cast<Destination*>(info->dest);
  destination->size = 0;
  if (!destination->block) destination_grow(info);
  destination->base.next_output_byte = destination->block;
  destination->base.free_in_buffer = destination->capacity;
}

void destination_end(j_compress_ptr info) {
  Destination* destination = reinterpret_cast<Destination*>(info->dest);
  destination->size = destination->capacity - destination->base.free_in_buffer;
}

}  // namespace

struct JpegDecoder::State {
  jpeg_decompress_struct info;
  Errors errors;
  Source source;
  jpeg_progress_mgr progress;
  bool created;
};

struct JpegEncoder::State {
  jpeg_compress_struct info;
  Errors errors;
  Destination destination;
  bool created;
};

namespace {

template <class State>
Status open_image(State* s, const uint8_t* data, size_t size) {
  static_assert(std::is_trivial_v<State>);
  if (setjmp(s->errors.escape)) return s->errors.status;
  if (!s->created) {
    s->info.err = install(&s->errors);
    jpeg_create_decompress(&s->info);
    s->created = true;
    s->info.mem->max_memory_to_use = kMaxCoefficientBytes;
    s->source.base.init_source = source_ready;
    s->source.base.fill_input_buffer = source_fill;
    s->source.base.skip_input_data = source_skip;
    s->source.base.resync_to_restart = jpeg_resync_to_restart;
    s->source.base.term_source = source_ready;
    s->info.src = &s->source.base;
    s->progress.progress_monitor = limit_scans;
    s->info.progress = &s->progress;
  }
  s->source.ran_dry = false;
  s->source.base.next_input_byte = data;
  s->source.base.bytes_in_buffer = size;
  jpeg_read_header(&s->info, TRUE);
  return Status::ok;
}

template <class State>
Status start_image(State* s) {
  if (setjmp(s->errors.escape)) return s->errors.status;
  switch (s->info.jpeg_color_space) {
    case JCS_GRAYSCALE:
    case JCS_YCbCr:
    case JCS_RGB:
      break;
    default:
      return Status::colour_space;
  }
  s->info.out_color_space = JCS_RGB;
  s->info.dct_method = JDCT_ISLOW;
  s->info.do_fancy_upsampling = TRUE;
  jpeg_start_decompress(&s->info);
  // All scans have been read now if there are several, and a missing one would go unnoticed below.
  if (s->source.ran_dry && jpeg_has_multiple_scans(&s->info)) return Status::corrupt;
  return Status::ok;
}

template <class State>
Status read_image_row(State* s, uint8_t* row) {
  if (setjmp(s->errors.escape)) return s->errors.status;
  JSAMPROW rows[1] = {row};
  if (jpeg_read_scanlines(&s->info, rows, 1) != 1) return Status::corrupt;
  // The arithmetic decoder does not warn about missing data: it reads zeros.
  if (s->source.ran_dry && s->info.arith_code) return Status::corrupt;
  return Status::ok;
}

template <class State>
Status encode_image(State* s, const uint8_t* rgb, int width, int height, int quality) {
  static_assert(std::is_trivial_v<State>);
  if (setjmp(s->errors.escape)) return s->errors.status;
  if (!s->created) {
    s->info.err = install(&s->errors);
    jpeg_create_compress(&s->info);
    s->created = true;
    s->destination.base.init_destination = destination_begin;
    s->destination.base.empty_output_buffer = destination_grow;
    s->destination.base.term_destination = destination_end;
    s->info.dest = &s->destination.base;
  }
  s->info.image_width = width;
  s->info.image_height = height;
  s->info.input_components = 3;
  s->info.in_color_space = JCS_RGB;
  jpeg_set_defaults(&s->info);
  jpeg_set_quality(&s->info, quality, TRUE);
  s->info.dct_method = JDCT_ISLOW;
  jpeg_start_compress(&s->info, TRUE);
  while (s->info.next_scanline < s->info.image_height) {
    const size_t offset = 3 * static_cast<size_t>(width) * s->info.next_scanline;
    JSAMPROW rows[1] = {const_cast<JSAMPROW>(rgb + offset)};  // libjpeg only reads it
    jpeg_write_scanlines(&s->info, rows, 1);
  }
  jpeg_finish_compress(&s->info);
  return Status::ok;
}

}  // namespace

JpegDecoder::JpegDecoder() : state_(new State()) {}

JpegDecoder::~JpegDecoder() {
  if (state_->created) jpeg_destroy_decompress(&state_->info);
}

Status JpegDecoder::open(const uint8_t* data, size_t size) {
  if (size < 2 || data[0] != 0xFF || data[1] != 0xD8) return Status::not_jpeg;
  const Status status = open_image(state_.get(), data, size);
  if (status != Status::ok) return status;
  return int64_t{width()} * height() > kMaxPixels ? Status::too_large : Status::ok;
}

int JpegDecoder::width() const { return static_cast<int>(state_->info.image_width); }
int JpegDecoder::height() const { return static_cast<int>(state_->info.image_height); }
int JpegDecoder::components() const { return state_->info.num_components; }

Status JpegDecoder::start() { return start_image(state_.get()); }
Status JpegDecoder::read_row(uint8_t* row) { return read_image_row(state_.get(), row); }

void JpegDecoder::close() {
  if (state_->created) jpeg_abort_decompress(&state_->info);
}

JpegEncoder::JpegEncoder() : state_(new State()) {}

JpegEncoder::~JpegEncoder() {
  if (state_->created) jpeg_destroy_compress(&state_->info);
  std::free(state_->destination.block);
}

Status JpegEncoder::encode(const uint8_t* rgb, int width, int height, int quality) {
  const Status status = encode_image(state_.get(), rgb, width, height, quality);
  if (status != Status::ok && state_->created) jpeg_abort_compress(&state_->info);
  return status;
}

const uint8_t* JpegEncoder::data() const { return state_->destination.block; }
size_t JpegEncoder::size() const { return state_->destination.size; }

}  // namespace matryoshka
