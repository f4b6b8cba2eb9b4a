#include "jpeg_errors.hpp"

#include <algorithm>

namespace matryoshka {
namespace {

void error_exit(j_common_ptr info) {
  switch (info->err->msg_code) {
    case JERR_NO_SOI: jpeg_fail(info, Status::not_jpeg);
    case JERR_BAD_J_COLORSPACE:
    case JERR_CONVERSION_NOTIMPL: jpeg_fail(info, Status::colour_space);
    case JERR_IMAGE_TOO_BIG:
    case JERR_WIDTH_OVERFLOW:
    case JERR_OUT_OF_MEMORY:
    case JERR_NO_BACKING_STORE: jpeg_fail(info, Status::too_large);
    default: jpeg_fail(info, Status::corrupt);
  }
}

// libjpeg continues after a warning, with grey or garbled pixels: make damage an error.
void emit_message(j_common_ptr info, int level) {
  if (level >= 0) return;
  switch (info->err->msg_code) {
    case JWRN_ADOBE_XFORM:
    case JWRN_JFIF_MAJOR:
    case JWRN_TOO_MUCH_DATA: return;
    case JWRN_EXTRANEOUS_DATA: {
      // Padding before a header marker is harmless; bytes left over before a restart marker are
      // lost blocks.
      const int marker = info->err->msg_parm.i[1];
      if (marker < JPEG_RST0 || marker > JPEG_RST0 + 7) return;
      break;
    }
    default: break;
  }
  jpeg_fail(info, Status::corrupt);
}

void output_message(j_common_ptr) {}

void source_no_op(j_decompress_ptr) {}

boolean source_fill(j_decompress_ptr info) {
  static const JOCTET end[2] = {0xFF, JPEG_EOI};
  reinterpret_cast<JpegSource*>(info->src)->exhausted = true;
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

}  // namespace

jpeg_error_mgr* install(JpegErrors* errors) {
  jpeg_std_error(&errors->base);
  errors->base.error_exit = error_exit;
  errors->base.emit_message = emit_message;
  errors->base.output_message = output_message;
  return &errors->base;
}

void install(JpegSource* source, j_decompress_ptr info) {
  source->base.init_source = source_no_op;
  source->base.fill_input_buffer = source_fill;
  source->base.skip_input_data = source_skip;
  source->base.resync_to_restart = jpeg_resync_to_restart;
  source->base.term_source = source_no_op;
  info->src = &source->base;
}

void set_data(JpegSource* source, const unsigned char* data, size_t size) {
  source->exhausted = false;
  source->base.next_input_byte = data;
  source->base.bytes_in_buffer = size;
}

void clear_tables(j_decompress_ptr info) {
  // 0 is not a legal value: has_quant_tables looks for it.
  for (JQUANT_TBL* table : info->quant_tbl_ptrs) {
    if (table) std::fill_n(table->quantval, DCTSIZE2, UINT16(0));
  }
  // 255 codes of every length are not a Huffman code: libjpeg refuses to use such a table.
  for (JHUFF_TBL** tables : {info->dc_huff_tbl_ptrs, info->ac_huff_tbl_ptrs}) {
    for (int i = 0; i < NUM_HUFF_TBLS; ++i) {
      if (!tables[i]) tables[i] = jpeg_alloc_huff_table(reinterpret_cast<j_common_ptr>(info));
      std::fill_n(tables[i]->bits, 17, UINT8(255));
    }
  }
}

bool has_quant_tables(const jpeg_decompress_struct& info) {
  const auto has_table = [](const jpeg_component_info& component) {
    if (!component.quant_table) return false;
    const UINT16* values = component.quant_table->quantval;
    return std::find(values, values + DCTSIZE2, 0) == values + DCTSIZE2;
  };
  return std::all_of(info.comp_info, info.comp_info + info.num_components, has_table);
}

}  // namespace matryoshka
