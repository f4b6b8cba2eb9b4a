// The innermost loops of search, compiled for several kinds of CPU and chosen at run time. Integer
// scores are identical on all of them.
//
// Codes have 7 bits (0 to 127): AVX2's vpmaddubsw adds two products of a code and a signed query
// byte in 16 bits, and 2 x 127 x 127 = 32258 stays below 32768.
//
// Layout of packed codes: groups of 16 rows; in a group, one 64-byte line for every chunk of 4
// dimensions, 4 bytes for each row. Layout of packed bits: groups of 8 rows; in a group, one
// 64-byte line for every word of 64 dimensions, one word for each row.
#pragma once

#include <cstddef>
#include <cstdint>

namespace matryoshka::search {

constexpr size_t kGroup = 16;          // rows in a group of codes
constexpr size_t kBitGroup = 8;        // rows in a group of bits
constexpr size_t kChunk = 4;           // dimensions
constexpr size_t kBlock = 64;          // rows whose scores are in registers at the same time
constexpr size_t kQueriesPerScan = 4;  // at most: queries that one scan compares with each block
constexpr size_t kRowsPerDot = 4;      // rows of one dot_half or dot_single

// A result as one number: higher keys have higher scores, equal scores the lower row. The score's
// sign bit is flipped so that unsigned comparison orders it.
inline uint64_t make_key(int32_t score, uint32_t row) {
  return static_cast<uint64_t>(static_cast<uint32_t>(score) ^ 0x80000000u) << 32 |
         static_cast<uint32_t>(~row);
}
inline int32_t key_score(uint64_t key) {
  return static_cast<int32_t>(static_cast<uint32_t>(key >> 32) ^ 0x80000000u);
}
inline uint32_t key_row(uint64_t key) { return ~static_cast<uint32_t>(key); }

// Where a scan writes the rows above a query's threshold, as keys. A scan stops, at a multiple of
// kBlock rows, when any query's room is less than kBlock.
struct HitBuffer {
  int32_t threshold;
  uint64_t* keys;
  size_t count;
  size_t room;  // keys that still fit

  // Add a row of a block, unless it is behind the last row or not above the threshold.
  void add(int32_t score, size_t row, size_t end) {
    if (score <= threshold || row >= end) return;
    keys[count++] = make_key(score, static_cast<uint32_t>(row));
    --room;
  }
};

// Whether all `count` buffers have room for another block.
inline bool has_room(HitBuffer* const* hits, size_t count) {
  bool room = true;
  for (size_t q = 0; q < count; ++q) room = room && hits[q]->room >= kBlock;
  return room;
}

struct Kernels {
  const char* name;
  // Compare rows first .. end of packed codes with `count` queries, 1 to kQueriesPerScan, of
  // 4 x `chunks` signed bytes. `first` is a multiple of kBlock; memory behind the last row must be
  // readable up to a multiple of kBlock rows. Returns the row at which it stopped.
  size_t (*scan_codes)(const uint8_t* codes, size_t first, size_t end, size_t chunks,
                       const int8_t* const* queries, size_t count, HitBuffer* const* hits);
  // The same for packed bits. The score is minus the Hamming distance.
  size_t (*scan_bits)(const uint64_t* bits, size_t first, size_t end, size_t words,
                      const uint64_t* const* queries, size_t count, HitBuffer* const* hits);
  // For each of kRowsPerDot rows of n numbers: add the dot product with the query to its `dots` and
  // the sum of squares to its `squares`. One row after the other would wait for memory 1.6 times as
  // long, because fewer loads are in flight.
  void (*dot_half)(const uint16_t* const* rows, const float* query, size_t n, float* dots,
                   float* squares);
  void (*dot_single)(const float* const* rows, const float* query, size_t n, float* dots,
                     float* squares);
};

// Only those of this kind of CPU are defined.
extern const Kernels kPortable, kAvx2, kVnni, kNeon, kDotprod;

// The kernels that this CPU can run, fastest first; a null pointer ends the list.
const Kernels* const* available_kernels();

}  // namespace matryoshka::search
