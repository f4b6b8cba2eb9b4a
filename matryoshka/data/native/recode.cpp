#include "recode.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

#include "entropy.hpp"
#include "image_kernels.hpp"
#include "status.hpp"

namespace matryoshka {
namespace {

// ITU-T T.81, table K.3: codes for differences of all sizes.
constexpr uint8_t kStandardDc[] = {0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0,  0,
                                   0, 0, 0, 0,  // codes of each length
                                   0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};

// False where a size has no code.
bool find_codes(const uint8_t* definition, DcCodes* codes) {
  *codes = {};
  uint32_t code = 0;
  const uint8_t* symbol = definition + 16;
  for (int length = 1; length <= 16; ++length, code <<= 1)
    for (int i = 0; i < definition[length - 1]; ++i, ++symbol, ++code)
      if (*symbol < DcCodes::kSizes)
        codes->code[*symbol] = static_cast<uint16_t>(code),
        codes->length[*symbol] = static_cast<uint8_t>(length);
  return std::find(codes->length, codes->length + DcCodes::kSizes, 0) ==
         codes->length + DcCodes::kSizes;
}

}  // namespace

bool Recoder::define_tables(const Frame& f) {
  scan_.components = f.components;
  scan_.all_dc = false;
  for (int i = 0; i < f.components; ++i) {
    const Frame::Component& from = f.component[i];
    const Bytes dc = f.huffman[0][from.dc], ac = f.huffman[1][from.ac];
    if (!f.factors[from.factors].data || !dc.data || !ac.data) return false;
    if (!tables_[0][from.dc].define(dc.data, dc.size, true)) return false;
    if (!tables_[1][from.ac].define(ac.data, ac.size, false)) return false;
    scan_.all_dc |= !find_codes(dc.data, &codes_[from.dc]);
    const bool alone = f.components == 1;
    scan_.component[i] = {alone ? 1 : from.h,
                          alone ? 1 : from.v,
                          &tables_[0][from.dc],
                          &tables_[1][from.ac],
                          &codes_[from.dc],
                          0,
                          0};
  }
  if (scan_.all_dc)
    for (DcCodes& codes : codes_) find_codes(kStandardDc, &codes);
  return true;
}

void Recoder::write_header(const Tiles& tiles, Bytes jpeg, unsigned interval) {
  const Frame& f = tiles.frame();
  result_.assign({0xFF, 0xD8});
  const auto table = [&](int number, const uint8_t* definition, size_t size) {
    result_.insert(result_.end(), {0xFF, 0xC4, static_cast<uint8_t>((size + 3) >> 8),
                                   static_cast<uint8_t>(size + 3), static_cast<uint8_t>(number)});
    result_.insert(result_.end(), definition, definition + size);
  };
  for (const HeaderPart& part : tiles.header()) {
    if (jpeg.data[part.begin + 1] == 0xC4) continue;
    if (part.end == f.scan) {
      for (int i = 0; i < 4; ++i) {
        const Bytes dc = f.huffman[0][i], ac = f.huffman[1][i];
        if (dc.data && scan_.all_dc) table(i, kStandardDc, sizeof kStandardDc);
        if (dc.data && !scan_.all_dc) table(i, dc.data, dc.size);
        if (ac.data) table(16 + i, ac.data, ac.size);
      }
      if (interval)
        result_.insert(result_.end(), {0xFF, 0xDD, 0, 4, static_cast<uint8_t>(interval >> 8),
                                       static_cast<uint8_t>(interval)});
    }
    result_.insert(result_.end(), jpeg.data + part.begin, jpeg.data + part.end);
  }
}

bool Recoder::recode(Tiles& tiles, Bytes jpeg, unsigned interval) {
  const Frame& f = tiles.frame();
  if (!f.plain || int64_t{f.width} * f.height > kMaxPixels || !define_tables(f)) return false;
  const int64_t total = int64_t{f.columns} * f.rows,
                source_interval = f.interval ? f.interval : total;
  const int64_t segments = (total + source_interval - 1) / source_interval;
  if (!tiles.find_segments(segments - 1)) return false;
  write_header(tiles, jpeg, interval);
  scan_.interval = interval ? interval : std::numeric_limits<int64_t>::max();
  // At worst every byte becomes 0xFF; a DC code grows by less than 4 bytes. A block has 2 bits at
  // least.
  int64_t blocks = 0, markers = interval ? total / interval + 1 : 1;
  for (int i = 0; i < f.components; ++i) blocks += scan_.component[i].h * scan_.component[i].v;
  const size_t anew =
      std::min<int64_t>(scan_.all_dc ? blocks * total : 3 * (markers + segments), 4 * jpeg.size);
  const size_t header = result_.size();
  result_.resize(header + 2 * (jpeg.size + 4 * anew) +
                 4 * std::min<int64_t>(markers, 4 * jpeg.size) + 16);
  scan_.out = {result_.data() + header, 0, 0};
  for (int64_t k = 0; k < segments; ++k) {
    const Bytes data = tiles.unstuffed(k);
    scan_.data = data.data;
    scan_.size = data.size;
    scan_.first = k * source_interval;
    scan_.last = std::min(scan_.first + source_interval, total);
    scan_.complete = k + 1 < segments;
    if (!kernels().recode_blocks(scan_)) return false;
  }
  *scan_.out.next++ = 0xFF;
  *scan_.out.next++ = 0xD9;
  size_ = scan_.out.next - result_.data();
  return true;
}

}  // namespace matryoshka
