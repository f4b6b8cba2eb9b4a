#include "recode.hpp"

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <limits>

#include "entropy.hpp"
#include "image_kernels.hpp"
#include "jpeg_markers.hpp"
#include "status.hpp"

namespace matryoshka {
namespace {

// T.81, table K.3: it has codes for DC differences of all sizes.
constexpr uint8_t kStandardDc[] = {0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0,  0, 0, 0, 0, 0,  // BITS
                                   0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};            // HUFFVAL

// T.81, C.2: codes of one length count up. False where a size has no code.
bool find_codes(const uint8_t* definition, DcCodes* codes) {
  *codes = {};
  uint32_t code = 0;
  const uint8_t* symbol = definition + 16;
  for (int length = 1; length <= 16; ++length) {
    for (int i = 0; i < definition[length - 1]; ++i) {
      if (*symbol < DcCodes::kSizes) {
        codes->code[*symbol] = static_cast<uint16_t>(code);
        codes->length[*symbol] = static_cast<uint8_t>(length);
      }
      ++symbol;
      ++code;
    }
    code <<= 1;
  }
  const uint8_t* const end = codes->length + DcCodes::kSizes;
  return std::find(static_cast<const uint8_t*>(codes->length), end, 0) == end;
}

void append(std::vector<uint8_t>& out, std::initializer_list<uint8_t> bytes) {
  out.insert(out.end(), bytes);
}

// B.2.4.2: a DHT segment of one table. id: table class and destination.
void append_dht(std::vector<uint8_t>& out, int id, const uint8_t* definition, size_t size) {
  const size_t length = size + 3;
  append(out, {0xFF, M_DHT, static_cast<uint8_t>(length >> 8), static_cast<uint8_t>(length),
               static_cast<uint8_t>(id)});
  out.insert(out.end(), definition, definition + size);
}

}  // namespace

bool Recoder::build_tables(const Frame& f) {
  job_.components = f.components;
  job_.rewrite_all_dc = false;
  for (int i = 0; i < f.components; ++i) {
    const Frame::Component& from = f.component[i];
    const Bytes dc = f.huffman_tables[0][from.dc_table];
    const Bytes ac = f.huffman_tables[1][from.ac_table];
    if (!f.quant_tables[from.quant_table].data || !dc.data || !ac.data) return false;
    HuffmanTable& dc_table = tables_[0][from.dc_table];
    HuffmanTable& ac_table = tables_[1][from.ac_table];
    if (!dc_table.build(dc.data, dc.size, true)) return false;
    if (!ac_table.build(ac.data, ac.size, false)) return false;
    // A table optimised for its image may lack a size that new differences have.
    DcCodes& codes = codes_[from.dc_table];
    job_.rewrite_all_dc |= !find_codes(dc.data, &codes);
    const int h = f.interleaved() ? from.h : 1;
    const int v = f.interleaved() ? from.v : 1;
    job_.component[i] = {h, v, &dc_table, &ac_table, &codes, 0, 0};
  }
  if (job_.rewrite_all_dc) {
    for (DcCodes& codes : codes_) find_codes(kStandardDc, &codes);
  }
  return true;
}

// The header parts of the source, with new DHT and DRI segments before the SOS segment.
void Recoder::write_header(const Tiles& tiles, Bytes jpeg, unsigned interval) {
  const Frame& f = tiles.frame();
  result_.assign({0xFF, M_SOI});
  for (const HeaderPart& part : tiles.header()) {
    if (jpeg.data[part.begin + 1] == M_DHT) continue;
    const bool is_sos = part.end == f.entropy_begin;
    if (is_sos) {
      for (int i = 0; i < 4; ++i) {
        const Bytes dc = f.huffman_tables[0][i];
        const Bytes ac = f.huffman_tables[1][i];
        if (dc.data && job_.rewrite_all_dc) {
          append_dht(result_, i, kStandardDc, sizeof kStandardDc);
        } else if (dc.data) {
          append_dht(result_, i, dc.data, dc.size);
        }
        if (ac.data) append_dht(result_, 16 + i, ac.data, ac.size);
      }
      if (interval) {
        append(result_, {0xFF, M_DRI, 0, 4, static_cast<uint8_t>(interval >> 8),
                         static_cast<uint8_t>(interval)});
      }
    }
    result_.insert(result_.end(), jpeg.data + part.begin, jpeg.data + part.end);
  }
}

bool Recoder::recode(Tiles& tiles, Bytes jpeg, unsigned interval) {
  const Frame& f = tiles.frame();
  if (!f.ordinary || int64_t{f.width} * f.height > kMaxPixels) return false;
  if (!build_tables(f)) return false;
  const int64_t total = int64_t{f.mcus_per_row} * f.mcu_rows;
  const int64_t source_interval = f.restart_interval ? f.restart_interval : total;
  const int64_t segments = (total + source_interval - 1) / source_interval;
  if (!tiles.find_segments(segments - 1)) return false;
  write_header(tiles, jpeg, interval);
  job_.restart_interval = interval ? interval : std::numeric_limits<int64_t>::max();

  // Memory for the worst case: stuffing doubles every byte, and a rewritten DC code grows by less
  // than 4 bytes. The counts are limited by the file's size because a block has at least 2 bits.
  int64_t blocks = 0;  // of an MCU
  for (int i = 0; i < f.components; ++i) blocks += job_.component[i].h * job_.component[i].v;
  const int64_t markers = interval ? total / interval + 1 : 1;
  const int64_t max_blocks = 4 * static_cast<int64_t>(jpeg.size);
  const int64_t rewritten = job_.rewrite_all_dc ? blocks * total : 3 * (markers + segments);
  const size_t coded_size = 2 * (jpeg.size + 4 * std::min(rewritten, max_blocks));
  const size_t header_size = result_.size();
  result_.resize(header_size + coded_size + 4 * std::min(markers, max_blocks) + 16);

  job_.out = {result_.data() + header_size, 0, 0};
  for (int64_t k = 0; k < segments; ++k) {
    const Bytes data = tiles.unstuffed(k);
    job_.data = data.data;
    job_.size = data.size;
    job_.first = k * source_interval;
    job_.last = std::min(job_.first + source_interval, total);
    job_.complete = k + 1 < segments;
    if (!kernels().recode_blocks(job_)) return false;
  }
  *job_.out.next++ = 0xFF;
  *job_.out.next++ = M_EOI;
  size_ = job_.out.next - result_.data();
  return true;
}

}  // namespace matryoshka
