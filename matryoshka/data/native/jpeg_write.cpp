#include "jpeg_write.hpp"

#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "jpeg_errors.hpp"

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
  JpegErrors errors;
  Destination destination;
  bool created;
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

// Write what the proof has read. Its Huffman tables may lack codes for these coefficients, after a
// run beyond a block for example, and the encoder does not check that: it makes new ones.
template <class State>
Status write_coefficients(State* s, Original* original, int tile) {
  if (setjmp(s->errors.escape)) return s->errors.status;
  create_writer(s);
  jpeg_copy_critical_parameters(original->info, &s->info);
  s->info.optimize_coding = TRUE;
  const int mcu = DCTSIZE * original->mcu_blocks;
  s->info.restart_interval = restart_interval(static_cast<int>(s->info.image_width), mcu, tile);
  jpeg_write_coefficients(&s->info, original->coefficients);
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
  std::free(state_->destination.block);
}

Status JpegWriter::encode(const uint8_t* rgb, int width, int height, int quality, int tile) {
  const Status status = encode_image(state_.get(), rgb, width, height, quality, tile);
  if (status != Status::ok && state_->created) jpeg_abort_compress(&state_->info);
  result_ = {state_->destination.block, state_->destination.size};
  return status;
}

Status JpegWriter::transcode(Bytes jpeg, int tile) {
  const Status status = copy_proven(jpeg, tile);
  proof_.close();
  return status;
}

Status JpegWriter::copy_proven(Bytes jpeg, int tile) {
  if (tiles_.parse(jpeg)) {
    const Frame& f = tiles_.frame();
    if (recoder_.recode(tiles_, jpeg, restart_interval(f.width, f.mcu_width, tile)) &&
        proof_.holds(jpeg, tiles_, recoder_.result())) {
      result_ = recoder_.result();
      return Status::ok;
    }
  }
  // Unusual and damaged files go through libjpeg, at a fifth of the speed.
  Status status = proof_.read(jpeg);
  if (status != Status::ok) return status;
  Original original = proof_.original();
  status = write_coefficients(state_.get(), &original, tile);
  result_ = {state_->destination.block, state_->destination.size};
  // libjpeg would reuse this image's Huffman tables for the next one.
  if (state_->created) jpeg_destroy_compress(&state_->info);
  state_->created = false;
  if (status != Status::ok) return status;
  return proof_.holds(result_) ? Status::ok : Status::not_copied;
}

}  // namespace matryoshka
