#include "jpeg.hpp"

#include <algorithm>
#include <type_traits>

#include "jpeg_errors.hpp"
#include "jpeg_markers.hpp"

namespace matryoshka {

struct JpegDecoder::State {
  jpeg_decompress_struct info;
  JpegErrors errors;
  JpegSource source;
  jpeg_progress_mgr progress;
  Bytes data;
  bool checked;  // the data has no filled stuffing
  bool created;
  int block_size;  // output pixels along one side of a block
  int x;           // of the first decoded column
};

namespace {

// Every scan of a progressive file passes over all coefficients: a small hostile file with many
// scans takes minutes to decode. Real ones have about 10.
constexpr int kMaxScans = 1000;

void limit_scans(j_common_ptr info) {
  if (reinterpret_cast<j_decompress_ptr>(info)->input_scan_number > kMaxScans)
    jpeg_fail(info, Status::corrupt);
}

template <class State>
Status open_image(State* s, const uint8_t* data, size_t size) {
  static_assert(std::is_trivial_v<State>);
  if (setjmp(s->errors.escape)) return s->errors.status;
  if (!s->created) {
    s->info.err = install(&s->errors);
    jpeg_create_decompress(&s->info);
    s->created = true;
    s->info.mem->max_memory_to_use = kMaxCoefficientBytes;
    install(&s->source, &s->info);
    s->progress.progress_monitor = limit_scans;
    s->info.progress = &s->progress;
  }
  s->data = {data, size};
  set_data(&s->source, data, size);
  clear_tables(&s->info);
  jpeg_read_header(&s->info, TRUE);
  return Status::ok;
}

// Restrict decoding to the MCU columns that the crop needs. Fancy upsampling reads the chroma
// sample on either side, 2 pixels away, and treats the first and last column, and images of up to 2
// chroma columns, differently: keep all of these outside the crop.
template <class State>
void crop_columns(State* s, int x, int width) {
  const int total = static_cast<int>(s->info.output_width);
  const int unit = s->block_size * s->info.max_h_samp_factor;
  int left = std::max(0, x - 2) / unit * unit;
  const int right = std::min(total, (x + width + 2 + unit - 1) / unit * unit);
  if (right - left < 4 * s->info.max_h_samp_factor) left = std::max(0, left - unit);
  s->x = 0;
  if (left == 0 && right == total) return;
  JDIMENSION offset = left;
  JDIMENSION columns = right - left;
  jpeg_crop_scanline(&s->info, &offset, &columns);
  s->x = static_cast<int>(offset);
}

// Whether the scans of a progressive image have sent all bits of all coefficients. libjpeg would
// smooth the blocks of an incomplete one, over neighbours that a crop does not have.
bool has_all_bits(const jpeg_decompress_struct& info) {
  if (!info.progressive_mode) return true;
  for (int i = 0; i < info.num_components; ++i) {
    const int* const missing = info.coef_bits[i];  // low bits not sent; -1: nothing sent
    if (std::any_of(missing, missing + DCTSIZE2, [](int bits) { return bits != 0; })) return false;
  }
  return true;
}

template <class State>
Status start_image(State* s, int x, int width, bool halve) {
  if (setjmp(s->errors.escape)) return s->errors.status;
  switch (s->info.jpeg_color_space) {
    case JCS_GRAYSCALE:
    case JCS_YCbCr:
    case JCS_RGB: break;
    default: return Status::colour_space;
  }
  if (!s->checked && has_filled_stuffing(s->data)) return Status::corrupt;
  s->info.out_color_space = JCS_RGB;
  s->info.dct_method = JDCT_ISLOW;
  s->info.do_fancy_upsampling = TRUE;
  s->info.scale_num = 1;
  s->info.scale_denom = halve ? 2 : 1;
  s->block_size = halve ? DCTSIZE / 2 : DCTSIZE;
  jpeg_start_decompress(&s->info);
  // Of several scans, all have been read here; a missing one would not be noticed later.
  if (s->source.exhausted && jpeg_has_multiple_scans(&s->info)) return Status::corrupt;
  if (!has_quant_tables(s->info) || !has_all_bits(s->info)) return Status::corrupt;
  crop_columns(s, x, width);
  return Status::ok;
}

template <class State>
Status read_image_row(State* s, uint8_t* row) {
  if (setjmp(s->errors.escape)) return s->errors.status;
  JSAMPROW rows[1] = {row};
  if (jpeg_read_scanlines(&s->info, rows, 1) != 1) return Status::corrupt;
  // The arithmetic decoder reads zeros instead of missing data, without a warning.
  if (s->source.exhausted && s->info.arith_code) return Status::corrupt;
  return Status::ok;
}

template <class State>
Status skip_image_rows(State* s, int rows) {
  if (setjmp(s->errors.escape)) return s->errors.status;
  if (jpeg_skip_scanlines(&s->info, rows) != static_cast<JDIMENSION>(rows)) return Status::corrupt;
  if (s->source.exhausted && s->info.arith_code) return Status::corrupt;
  return Status::ok;
}

}  // namespace

JpegDecoder::JpegDecoder() : state_(new State()) {}

JpegDecoder::~JpegDecoder() {
  if (state_->created) jpeg_destroy_decompress(&state_->info);
}

Status JpegDecoder::open(Bytes jpeg, bool checked) {
  state_->checked = checked;
  if (jpeg.size < 2 || jpeg.data[0] != 0xFF || jpeg.data[1] != M_SOI) return Status::not_jpeg;
  const Status status = open_image(state_.get(), jpeg.data, jpeg.size);
  if (status != Status::ok) return status;
  return int64_t{width()} * height() > kMaxPixels ? Status::too_large : Status::ok;
}

int JpegDecoder::width() const { return static_cast<int>(state_->info.image_width); }
int JpegDecoder::height() const { return static_cast<int>(state_->info.image_height); }
int JpegDecoder::components() const { return state_->info.num_components; }
int JpegDecoder::row_x() const { return state_->x; }
int JpegDecoder::row_width() const { return static_cast<int>(state_->info.output_width); }

Status JpegDecoder::start(int x, int width, bool halve) {
  return start_image(state_.get(), x, width, halve);
}
Status JpegDecoder::read_row(uint8_t* row) { return read_image_row(state_.get(), row); }

Status JpegDecoder::skip_to(int y, uint8_t* scratch_row) {
  // Decode one MCU row above as a margin: upsampling needs its chroma.
  const int unit = state_->block_size * state_->info.max_v_samp_factor;
  const int skipped = std::max(0, y / unit - 1) * unit;
  if (skipped > 0)
    if (const Status status = skip_image_rows(state_.get(), skipped); status != Status::ok)
      return status;
  for (int row = skipped; row < y; ++row)
    if (const Status status = read_row(scratch_row); status != Status::ok) return status;
  return Status::ok;
}

bool JpegDecoder::has_unread_data(const uint8_t* end) const {
  const jpeg_decompress_struct& info = state_->info;
  return info.input_iMCU_row == info.total_iMCU_rows && info.src->next_input_byte < end;
}

void JpegDecoder::close() {
  if (state_->created) jpeg_abort_decompress(&state_->info);
}

}  // namespace matryoshka
