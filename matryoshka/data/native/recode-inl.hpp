// Copying of entropy-coded blocks. Part of image_kernels-inl.hpp.
#pragma once

#include "entropy-inl.hpp"
#include "jpeg_markers.hpp"
#include "recode.hpp"

namespace matryoshka {
namespace {

// Append the low n <= 32 bits of `value`; its other bits are zero.
inline void put_bits(BitWriter& w, uint32_t value, int n) {
  w.bits = w.bits << n | value;
  w.count += n;
  if (w.count < 32) return;
  w.count -= 32;
  const uint32_t word = static_cast<uint32_t>(w.bits >> w.count);
  // Is any byte 0xFF? It then needs stuffing (T.81, F.1.2.3). A carry from the byte below makes
  // 0xFE look like 0xFF: that takes the slow way for nothing, and is still correct.
  if (__builtin_expect(word & 0x80808080u & ~(word + 0x01010101u), 0)) {
    for (int shift = 24; shift >= 0; shift -= 8) {
      const uint8_t byte = static_cast<uint8_t>(word >> shift);
      *w.next++ = byte;
      if (byte == 0xFF) *w.next++ = 0;
    }
    return;
  }
  // The compiler makes one store of this loop.
  for (int shift = 24; shift >= 0; shift -= 8) *w.next++ = static_cast<uint8_t>(word >> shift);
}

// Append the bits [begin, end) of `data`.
inline void copy_bits(BitWriter& w, const uint8_t* data, int64_t begin, int64_t end) {
  for (; end - begin >= 32; begin += 32) put_bits(w, load_bits(data, begin), 32);
  const int rest = static_cast<int>(end - begin);
  if (rest > 0) put_bits(w, load_bits(data, begin) >> (32 - rest), rest);
}

// Pad the last byte with ones and write it (T.81, F.1.2.3).
inline void end_segment(BitWriter& w) {
  const int fill = -w.count & 7;
  put_bits(w, (1u << fill) - 1, fill);
  while (w.count > 0) {
    w.count -= 8;
    const uint8_t byte = static_cast<uint8_t>(w.bits >> w.count);
    *w.next++ = byte;
    if (byte == 0xFF) *w.next++ = 0;
  }
}

// Append a DC difference: the code of its size, then its bits (T.81, F.1.2.1). False if the size
// has no code.
inline bool put_dc(BitWriter& w, const DcCodes& codes, int32_t difference) {
  const uint32_t magnitude = static_cast<uint32_t>(difference < 0 ? -difference : difference);
  const int size = magnitude ? 32 - __builtin_clz(magnitude) : 0;
  if (size >= DcCodes::kSizes) return false;
  const uint32_t mask = (1u << size) - 1;
  const uint32_t bits = static_cast<uint32_t>(difference < 0 ? difference - 1 : difference) & mask;
  put_bits(w, static_cast<uint32_t>(codes.code[size]) << size | bits, codes.length[size] + size);
  return true;
}

bool recode_blocks(RecodeJob& job) {
  BitReader in{job.data, job.data, 0, 0};
  BitWriter out = job.out;
  const int64_t available = static_cast<int64_t>(job.size) * 8;
  int64_t copied = 0;  // bits of the source that are in the result
  for (int i = 0; i < job.components; ++i) job.component[i].dc_pred = 0;
  const int64_t interval = job.restart_interval;
  int64_t until_restart = (interval - job.first % interval) % interval;

  for (int64_t mcu = job.first; mcu < job.last; ++mcu, --until_restart) {
    // Predictions start from zero behind each marker, of the source and of the result.
    bool rewrite_dc = mcu == job.first;
    if (until_restart == 0) {
      until_restart = interval;
      rewrite_dc = true;
      if (mcu > 0) {
        copy_bits(out, job.data, copied, in.bits_used());
        copied = in.bits_used();
        end_segment(out);
        *out.next++ = 0xFF;
        *out.next++ = restart_marker(mcu / interval - 1);
      }
      for (int i = 0; i < job.components; ++i) job.component[i].out_dc_pred = 0;
    }
    for (int i = 0; i < job.components; ++i) {
      RecodeJob::Component& c = job.component[i];
      for (int k = 0; k < c.h * c.v; ++k) {
        BitReader block = in;  // stays in registers
        int32_t difference;
        const int64_t begin = in.bits_used();
        if (!decode_dc(block, *c.dc, &difference)) return false;
        c.dc_pred += difference;
        if (c.dc_pred != static_cast<int16_t>(c.dc_pred)) return false;
        if (job.rewrite_all_dc || (rewrite_dc && k == 0)) {
          copy_bits(out, job.data, copied, begin);
          copied = block.bits_used();
          if (copied > available) return false;
          if (!put_dc(out, *c.codes, c.dc_pred - c.out_dc_pred)) return false;
        }
        c.out_dc_pred = c.dc_pred;
        if (!skip_ac(block, *c.ac) || block.bits_used() > available) return false;
        in = block;
      }
    }
  }
  copy_bits(out, job.data, copied, in.bits_used());
  if (!job.complete) end_segment(out);
  job.out = out;
  return !job.complete || available - in.bits_used() < 8;  // see decode_blocks
}

}  // namespace
}  // namespace matryoshka
