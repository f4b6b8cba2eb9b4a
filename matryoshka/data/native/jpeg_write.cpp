#include "jpeg_write.hpp"

#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "jpeg_errors.hpp"
#include "jpeg_markers.hpp"

namespace matryoshka {
namespace {

// A growing block of memory, kept for the next image.
struct Destination {
  jpeg_destination_mgr base;
  JOCTET* block;
  size_t capacity, size;
};

boolean destination_grow(j_compress_ptr info) {
  Destination* destination = reinterpret_cast<Destination*>(info->dest);
  const size_t used = destination->capacity;
  const size_t capacity = used ? 2 * used : size_t{1} << 16;
  void* block = std::realloc(destination->block, capacity);
  if (!block) jpeg_fail(reinterpret_cast<j_common_ptr>(info), Status::too_large);
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

struct JpegWriter::State {
  jpeg_compress_struct info;
  jpeg_decompress_struct original;  // the source of a transcode; shares the errors
  JpegErrors errors;
  JpegSource source;
  Destination destination;
  bool created, reader_created;
};

namespace {

template <class State>
void create_writer(State* s) {
  if (s->created) return;
  s->info.err = install(&s->errors);
  jpeg_create_compress(&s->info);
  s->created = true;
  s->destination.base.init_destination = destination_begin;
  s->destination.base.empty_output_buffer = destination_grow;
  s->destination.base.term_destination = destination_end;
  s->info.dest = &s->destination.base;
}

template <class State>
void create_reader(State* s) {
  if (s->reader_created) return;
  s->original.err = install(&s->errors);
  jpeg_create_decompress(&s->original);
  s->reader_created = true;
  s->original.mem->max_memory_to_use = kMaxCoefficientBytes;
  install(&s->source, &s->original);
}

template <class State>
Status encode_image(State* s, const uint8_t* rgb, int width, int height, int quality, int tile) {
  static_assert(std::is_trivial_v<State>);
  if (setjmp(s->errors.escape)) return s->errors.status;
  create_writer(s);
  s->info.image_width = width;
  s->info.image_height = height;
  s->info.input_components = 3;
  s->info.in_color_space = JCS_RGB;
  jpeg_set_defaults(&s->info);
  jpeg_set_quality(&s->info, quality, TRUE);
  s->info.dct_method = JDCT_ISLOW;
  s->info.restart_interval = restart_interval(width, 2 * DCTSIZE, tile);
  jpeg_start_compress(&s->info, TRUE);
  while (s->info.next_scanline < s->info.image_height) {
    const size_t offset = 3 * static_cast<size_t>(width) * s->info.next_scanline;
    JSAMPROW rows[1] = {const_cast<JSAMPROW>(rgb + offset)};  // libjpeg only reads it
    jpeg_write_scanlines(&s->info, rows, 1);
  }
  jpeg_finish_compress(&s->info);
  return Status::ok;
}

// Whether all coefficients have codes in the standard DC tables and in the source's AC tables,
// which the encoder does not check. Restart markers change only DC differences.
bool fit_known_tables(jpeg_decompress_struct* from, jvirt_barray_ptr* coefficients) {
  if (jpeg_has_multiple_scans(from)) return false;  // tables may change between scans
  for (int i = 0; i < from->num_components; ++i) {
    const jpeg_component_info& c = from->comp_info[i];
    int magnitude_bits = 0;  // of all coefficients together
    for (JDIMENSION y = 0; y < c.height_in_blocks; ++y) {
      const auto info = reinterpret_cast<j_common_ptr>(from);
      JBLOCKARRAY row = from->mem->access_virt_barray(info, coefficients[i], y, 1, FALSE);
      const JCOEF* values = row[0][0];
      for (size_t k = 0; k < size_t{DCTSIZE2} * c.width_in_blocks; ++k)
        magnitude_bits |= values[k] ^ values[k] >> 15;
    }
    if (magnitude_bits > 1023) return false;  // the limit of AC coefficients (T.81, F.1.2.2)
  }
  return true;
}

// Use the source's AC tables: counting symbols for better ones would take longer than all the rest.
void copy_ac_tables(const jpeg_decompress_struct* from, jpeg_compress_struct* to) {
  for (int i = 0; i < NUM_HUFF_TBLS; ++i) {
    const JHUFF_TBL* table = from->ac_huff_tbl_ptrs[i];
    if (!table) continue;
    JHUFF_TBL*& slot = to->ac_huff_tbl_ptrs[i];
    if (!slot) slot = jpeg_alloc_huff_table(reinterpret_cast<j_common_ptr>(to));
    std::copy_n(table->bits, 17, slot->bits);
    std::copy_n(table->huffval, 256, slot->huffval);
    slot->sent_table = FALSE;
  }
  for (int i = 0; i < to->num_components; ++i)
    to->comp_info[i].ac_tbl_no = from->comp_info[i].ac_tbl_no;
}

template <class State>
Status transcode_image(State* s, const uint8_t* data, size_t size, int tile) {
  if (setjmp(s->errors.escape)) return s->errors.status;
  create_writer(s);
  create_reader(s);
  set_data(&s->source, data, size);
  jpeg_decompress_struct& from = s->original;
  clear_tables(&from);
  jpeg_read_header(&from, TRUE);
  if (int64_t{from.image_width} * from.image_height > kMaxPixels) return Status::too_large;
  if (from.progressive_mode || from.arith_code || from.data_precision != BITS_IN_JSAMPLE)
    return Status::not_baseline;
  switch (from.jpeg_color_space) {
    case JCS_GRAYSCALE:
    case JCS_YCbCr:
    case JCS_RGB: break;
    default: return Status::colour_space;
  }
  jvirt_barray_ptr* coefficients = jpeg_read_coefficients(&from);
  if (s->source.exhausted && jpeg_has_multiple_scans(&from)) return Status::corrupt;
  if (!has_quant_tables(from)) return Status::corrupt;
  jpeg_copy_critical_parameters(&from, &s->info);
  s->info.optimize_coding = !fit_known_tables(&from, coefficients);
  if (!s->info.optimize_coding) copy_ac_tables(&from, &s->info);
  const int mcu = DCTSIZE * (from.num_components == 1 ? 1 : from.max_h_samp_factor);
  s->info.restart_interval = restart_interval(static_cast<int>(from.image_width), mcu, tile);
  jpeg_write_coefficients(&s->info, coefficients);
  jpeg_finish_compress(&s->info);
  return Status::ok;
}

}  // namespace

unsigned restart_interval(int image_width, int mcu_width, int tile) {
  if (tile <= 0) return 0;
  const int64_t row = (int64_t{image_width} + mcu_width - 1) / mcu_width;
  const int64_t target = std::max<int64_t>(1, (int64_t{tile} + mcu_width / 2) / mcu_width);
  const auto ratio_to_target = [&](int64_t n) {
    return n > target ? double(n) / target : double(target) / n;
  };
  int64_t best = row;
  for (int64_t n = 1; n < row; ++n) {  // a row has at most 8192 MCUs
    if (row % n != 0) continue;
    // Not less than half the target: each tile costs about 4 bytes.
    if (2 * n >= target && ratio_to_target(n) <= ratio_to_target(best)) best = n;
  }
  return static_cast<unsigned>(best);
}

JpegWriter::JpegWriter() : state_(new State()) {}

JpegWriter::~JpegWriter() {
  if (state_->created) jpeg_destroy_compress(&state_->info);
  if (state_->reader_created) jpeg_destroy_decompress(&state_->original);
  std::free(state_->destination.block);
}

Status JpegWriter::encode(const uint8_t* rgb, int width, int height, int quality, int tile) {
  const Status status = encode_image(state_.get(), rgb, width, height, quality, tile);
  if (status != Status::ok && state_->created) jpeg_abort_compress(&state_->info);
  result_ = {state_->destination.block, state_->destination.size};
  return status;
}

Status JpegWriter::transcode(Bytes jpeg, int tile) {
  if (jpeg.size < 2 || jpeg.data[0] != 0xFF || jpeg.data[1] != M_SOI) return Status::not_jpeg;
  if (tiles_.parse(jpeg)) {
    const Frame& f = tiles_.frame();
    if (recoder_.recode(tiles_, jpeg, restart_interval(f.width, f.mcu_width, tile))) {
      result_ = recoder_.result();
      return Status::ok;
    }
  }
  // Unusual and damaged files go through libjpeg, at a fifth of the speed.
  const Status status = transcode_image(state_.get(), jpeg.data, jpeg.size, tile);
  result_ = {state_->destination.block, state_->destination.size};
  // libjpeg would reuse this image's Huffman tables for the next one.
  if (state_->created) jpeg_destroy_compress(&state_->info);
  state_->created = false;
  if (state_->reader_created) jpeg_abort_decompress(&state_->original);
  return status;
}

}  // namespace matryoshka
