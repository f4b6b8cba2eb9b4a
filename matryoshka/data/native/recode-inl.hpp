// Copying of entropy-coded blocks. Part of image_kernels-inl.hpp.
#include "recode.hpp"

namespace matryoshka {
namespace {

inline void put(BitWriter& w, uint32_t value, int n) {  // n <= 32
  w.bits = w.bits << n | value;
  w.count += n;
  if (w.count < 32) return;
  w.count -= 32;
  const uint32_t word = static_cast<uint32_t>(w.bits >> w.count);
  // With a carry from below, 0xFE looks like 0xFF: slower, not wrong.
  if (__builtin_expect(word & 0x80808080u & ~(word + 0x01010101u), 0)) {
    for (int shift = 24; shift >= 0; shift -= 8) {
      const uint8_t byte = static_cast<uint8_t>(word >> shift);
      *w.next++ = byte;
      if (byte == 0xFF) *w.next++ = 0;
    }
    return;
  }
  for (int shift = 24; shift >= 0; shift -= 8)
    *w.next++ = static_cast<uint8_t>(word >> shift);  // one store
}

inline void copy_bits(BitWriter& w, const uint8_t* data, int64_t from, int64_t to) {
  const auto word = [&] {  // 32 bits from `from` on
    uint64_t value;
    std::memcpy(&value, data + (from >> 3), sizeof value);
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    value = __builtin_bswap64(value);
#endif
    return static_cast<uint32_t>(value << (from & 7) >> 32);
  };
  for (; to - from >= 32; from += 32) put(w, word(), 32);
  if (to > from) put(w, word() >> (32 - (to - from)), static_cast<int>(to - from));
}

// Fills the last byte with ones.
inline void end_segment(BitWriter& w) {
  const int fill = -w.count & 7;
  put(w, (1u << fill) - 1, fill);
  while (w.count > 0) {
    w.count -= 8;
    *w.next = static_cast<uint8_t>(w.bits >> w.count);
    if (*w.next++ == 0xFF) *w.next++ = 0;
  }
}

inline bool put_dc(BitWriter& w, const DcCodes& codes, int32_t difference) {
  const uint32_t magnitude = static_cast<uint32_t>(difference < 0 ? -difference : difference);
  const int size = magnitude ? 32 - __builtin_clz(magnitude) : 0;
  if (size >= DcCodes::kSizes) return false;
  const uint32_t value =
      static_cast<uint32_t>(difference < 0 ? difference - 1 : difference) & ((1u << size) - 1);
  put(w, static_cast<uint32_t>(codes.code[size]) << size | value, codes.length[size] + size);
  return true;
}

bool recode_blocks(RecodeScan& scan) {
  BitReader in{scan.data, scan.data, 0, 0};
  BitWriter out = scan.out;
  const int64_t available = static_cast<int64_t>(scan.size) * 8;
  int64_t copied = 0;  // bits of the source
  for (int i = 0; i < scan.components; ++i) scan.component[i].prediction = 0;
  int64_t until_restart = (scan.interval - scan.first % scan.interval) % scan.interval;
  for (int64_t mcu = scan.first; mcu < scan.last; ++mcu, --until_restart) {
    bool anew = mcu == scan.first;
    if (until_restart == 0) {
      until_restart = scan.interval;
      anew = true;
      if (mcu) {
        copy_bits(out, scan.data, copied, in.used());
        copied = in.used();
        end_segment(out);
        *out.next++ = 0xFF;
        *out.next++ = static_cast<uint8_t>(0xD0 + (mcu / scan.interval - 1) % 8);
      }
      for (int i = 0; i < scan.components; ++i) scan.component[i].written = 0;
    }
    for (int i = 0; i < scan.components; ++i) {
      RecodeScan::Component& c = scan.component[i];
      for (int k = 0; k < c.h * c.v; ++k) {
        BitReader block = in;
        int32_t difference;
        const int64_t begin = in.used();
        if (!read_dc(block, *c.dc, &difference)) return false;
        c.prediction += difference;
        if (c.prediction != static_cast<int16_t>(c.prediction)) return false;
        if (scan.all_dc || (anew && k == 0)) {
          copy_bits(out, scan.data, copied, begin);
          copied = block.used();
          if (copied > available || !put_dc(out, *c.codes, c.prediction - c.written)) return false;
        }
        c.written = c.prediction;
        if (!skip_ac(block, *c.ac) || block.used() > available) return false;
        in = block;
      }
    }
  }
  copy_bits(out, scan.data, copied, in.used());
  if (!scan.complete) end_segment(out);
  scan.out = out;
  return !scan.complete || available - in.used() < 8;
}

}  // namespace
}  // namespace matryoshka
