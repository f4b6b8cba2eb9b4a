#include "proof.hpp"

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "entropy.hpp"
#include "image_kernels.hpp"
#include "jpeg_errors.hpp"
#include "jpeg_markers.hpp"

namespace matryoshka {
namespace {

// libjpeg's reader of one image.
struct Reader {
  jpeg_decompress_struct info;
  JpegErrors errors;
  JpegSource source;
  jvirt_barray_ptr* coefficients;
  bool created;
};

void read_header(Reader* r, Bytes jpeg) {
  if (!r->created) {
    r->info.err = install(&r->errors);
    jpeg_create_decompress(&r->info);
    r->created = true;
    r->info.mem->max_memory_to_use = kMaxCoefficientBytes;
    install(&r->source, &r->info);
  }
  jpeg_abort_decompress(&r->info);
  set_data(&r->source, jpeg.data, jpeg.size);
  clear_tables(&r->info);
  jpeg_read_header(&r->info, TRUE);
}

// JpegDecoder refuses other factors when it prepares the upsampling, and larger MCUs.
bool has_legal_factors(const jpeg_decompress_struct& info) {
  int blocks = 0;
  for (int i = 0; i < info.num_components; ++i) {
    const jpeg_component_info& c = info.comp_info[i];
    if (info.max_h_samp_factor % c.h_samp_factor || info.max_v_samp_factor % c.v_samp_factor)
      return false;
    blocks += c.h_samp_factor * c.v_samp_factor;
  }
  return info.num_components == 1 || blocks <= D_MAX_BLOCKS_IN_MCU;
}

// From the header only, for baseline JPEGs.
Status check_header(const jpeg_decompress_struct& info) {
  if (int64_t{info.image_width} * info.image_height > kMaxPixels) return Status::too_large;
  if (info.progressive_mode || info.arith_code || info.data_precision != BITS_IN_JSAMPLE)
    return Status::not_baseline;
  switch (info.jpeg_color_space) {
    case JCS_GRAYSCALE:
    case JCS_YCbCr:
    case JCS_RGB: break;
    default: return Status::colour_space;
  }
  return has_legal_factors(info) ? Status::ok : Status::corrupt;
}

Status read_coefficients(Reader* r, Bytes jpeg) {
  static_assert(std::is_trivial_v<Reader>);
  if (setjmp(r->errors.escape)) return r->errors.status;
  read_header(r, jpeg);
  if (const Status status = check_header(r->info); status != Status::ok) return status;
  if (has_filled_stuffing(jpeg)) return Status::corrupt;
  r->coefficients = jpeg_read_coefficients(&r->info);
  if (r->source.exhausted && jpeg_has_multiple_scans(&r->info)) return Status::corrupt;
  return has_quant_tables(r->info) ? Status::ok : Status::corrupt;
}

// The first `count` rows of blocks. All coefficients are in memory: the pointers stay valid.
bool find_rows(Reader* r, int component, const JCOEF** rows, size_t count) {
  if (setjmp(r->errors.escape)) return false;
  const auto info = reinterpret_cast<j_common_ptr>(&r->info);
  for (size_t y = 0; y < count; ++y) {
    const auto row = static_cast<JDIMENSION>(y);
    rows[y] =
        r->info.mem->access_virt_barray(info, r->coefficients[component], row, 1, FALSE)[0][0];
  }
  return true;
}

// The quantisation table of a component: after the header, the one that a first scan will use.
const JQUANT_TBL* quant_table(const jpeg_decompress_struct& info, int component) {
  const jpeg_component_info& c = info.comp_info[component];
  if (c.quant_table) return c.quant_table;
  const bool exists = c.quant_tbl_no >= 0 && c.quant_tbl_no < NUM_QUANT_TBLS;
  return exists ? info.quant_tbl_ptrs[c.quant_tbl_no] : nullptr;
}

// All but the coefficients. A zero in a quantisation table is damage.
bool same_parameters(const jpeg_decompress_struct& a, const jpeg_decompress_struct& b) {
  if (a.image_width != b.image_width || a.image_height != b.image_height ||
      a.num_components != b.num_components || a.jpeg_color_space != b.jpeg_color_space)
    return false;
  for (int i = 0; i < a.num_components; ++i) {
    const jpeg_component_info& c = a.comp_info[i];
    const jpeg_component_info& d = b.comp_info[i];
    if (c.h_samp_factor != d.h_samp_factor || c.v_samp_factor != d.v_samp_factor) return false;
    const JQUANT_TBL* from = quant_table(a, i);
    const JQUANT_TBL* to = quant_table(b, i);
    if (!from || !to) return false;
    for (int k = 0; k < DCTSIZE2; ++k) {
      if (from->quantval[k] == 0 || from->quantval[k] != to->quantval[k]) return false;
    }
  }
  return true;
}

bool has_legal_header(Reader* r, Bytes jpeg) {
  if (setjmp(r->errors.escape)) return false;
  read_header(r, jpeg);
  return check_header(r->info) == Status::ok;
}

}  // namespace

struct Proof::State {
  Reader original, copy;
};

Proof::Proof() : state_(new State()) {}

Proof::~Proof() {
  for (Reader* reader : {&state_->original, &state_->copy}) {
    if (reader->created) jpeg_destroy_decompress(&reader->info);
  }
}

Status Proof::read(Bytes jpeg) {
  if (jpeg.size < 2 || jpeg.data[0] != 0xFF || jpeg.data[1] != M_SOI) return Status::not_jpeg;
  return read_coefficients(&state_->original, jpeg);
}

Original Proof::original() {
  jpeg_decompress_struct& info = state_->original.info;
  return {&info, state_->original.coefficients,
          info.num_components == 1 ? 1 : info.max_h_samp_factor};
}

void Proof::close() {
  for (Reader* reader : {&state_->original, &state_->copy}) {
    if (reader->created) jpeg_abort_decompress(&reader->info);
  }
}

bool Proof::holds(Bytes jpeg, Tiles& tiles, Bytes copy) {
  return has_legal_header(&state_->original, jpeg) && has_legal_header(&state_->copy, copy) &&
         same_parameters(state_->original.info, state_->copy.info) && copy_tiles_.parse(copy) &&
         same_blocks(tiles);
}

bool Proof::build_tables(const Frame& f, int side) {
  for (int i = 0; i < f.components; ++i) {
    const Frame::Component& from = f.component[i];
    const Bytes dc = f.huffman_tables[0][from.dc_table];
    const Bytes ac = f.huffman_tables[1][from.ac_table];
    if (!dc.data || !ac.data) return false;
    HuffmanTable& dc_table = dc_tables_[side][from.dc_table];
    HuffmanTable& ac_table = ac_tables_[side][from.ac_table];
    if (!dc_table.build(dc.data, dc.size, true)) return false;
    if (!ac_table.build(ac.data, ac.size, false)) return false;
    job_.side[side].dc[i] = &dc_table;
    // The definitions are compared with those of the source, which comes first.
    if (side == 0) job_.ac[i] = &ac_table;
    const auto& definition = job_.ac[i]->definition;
    if (std::memcmp(definition, ac_table.definition, sizeof definition) != 0) return false;
  }
  return true;
}

bool Proof::same_blocks(Tiles& tiles) {
  Tiles* const both[2] = {&tiles, &copy_tiles_};
  const Frame& f = tiles.frame();
  const int64_t total = int64_t{f.mcus_per_row} * f.mcu_rows;
  int64_t interval[2];
  for (int side = 0; side < 2; ++side) {
    const Frame& frame = both[side]->frame();
    if (!frame.ordinary || !build_tables(frame, side)) return false;
    interval[side] = frame.restart_interval ? frame.restart_interval : total;
  }
  if (!copy_tiles_.find_segments((total - 1) / interval[1])) return false;
  job_.components = f.components;
  for (int i = 0; i < f.components; ++i)
    job_.blocks[i] = f.interleaved() ? f.component[i].h * f.component[i].v : 1;

  // From one restart marker of either file to the next.
  for (int64_t first = 0; first < total; first = job_.last) {
    int64_t end[2];  // of the segments
    for (int side = 0; side < 2; ++side) {
      const int64_t k = first / interval[side];
      end[side] = std::min((k + 1) * interval[side], total);
      if (first % interval[side] != 0) continue;
      CompareJob::Side& s = job_.side[side];
      const Bytes data = both[side]->unstuffed(static_cast<size_t>(k));
      s.data = data.data;
      s.size = data.size;
      s.place = 0;
      std::fill_n(s.dc_pred, 3, 0);
    }
    job_.first = first;
    job_.last = std::min(end[0], end[1]);
    for (int side = 0; side < 2; ++side)
      job_.side[side].complete = end[side] == job_.last && job_.last < total;
    if (!kernels().equal_blocks(job_)) return false;
  }
  return true;
}

// Outside the image, blocks that fill the last MCUs may differ: no pixel depends on them.
bool Proof::holds(Bytes copy) {
  if (read_coefficients(&state_->copy, copy) != Status::ok) return false;
  const jpeg_decompress_struct& info = state_->original.info;
  if (!same_parameters(info, state_->copy.info)) return false;
  for (int i = 0; i < info.num_components; ++i) {
    const size_t height = info.comp_info[i].height_in_blocks;
    const size_t size = sizeof(JBLOCK) * info.comp_info[i].width_in_blocks;
    rows_.resize(2 * height);  // of the source, then of the copy
    if (!find_rows(&state_->original, i, rows_.data(), height)) return false;
    if (!find_rows(&state_->copy, i, rows_.data() + height, height)) return false;
    for (size_t y = 0; y < height; ++y) {
      if (std::memcmp(rows_[y], rows_[height + y], size) != 0) return false;
    }
  }
  return true;
}

}  // namespace matryoshka
