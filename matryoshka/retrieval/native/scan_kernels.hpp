// The innermost loops of search, compiled for several kinds of CPU. Integer scores are the same on
// all of them.
//
// Codes of 7 bits (0 to 127) so that AVX2's pairs of products, at most 2 x 127 x 127, stay below
// 32768. Layout: groups of 16 rows; of a group, chunks of 4 dimensions; a chunk is 64 bytes, 4 for
// each row. Bits: groups of 8 rows; of a group, words of 64 dimensions; 64 bytes, a word for each
// row.
#pragma once

#include <cstddef>
#include <cstdint>

namespace matryoshka::search {

constexpr size_t kGroup = 16;    // rows
constexpr size_t kBlock = 64;    // rows whose scores are in registers together
constexpr size_t kChunk = 4;     // dimensions
constexpr size_t kBitGroup = 8;  // rows
constexpr size_t kTogether = 4;  // rows that re-ranking multiplies together
constexpr size_t kQueries = 4;   // that scans compare with the rows in registers

// Sorts by falling score, equal scores by rising row.
inline uint64_t make_key(int32_t score, uint32_t row) {
  return static_cast<uint64_t>(static_cast<uint32_t>(score) ^ 0x80000000u) << 32 |
         static_cast<uint32_t>(~row);
}
inline int32_t key_score(uint64_t key) {
  return static_cast<int32_t>(static_cast<uint32_t>(key >> 32) ^ 0x80000000u);
}
inline uint32_t key_row(uint64_t key) { return ~static_cast<uint32_t>(key); }

// Rows whose score is above a threshold, as keys. `room` is what `keys` has left: a scan stops, at
// a multiple of kBlock rows, when that of any query is less than kBlock.
struct Found {
  int32_t threshold;
  uint64_t* keys;
  size_t count;
  size_t room;

  // A row of a block, unless it is behind the last one or not above the threshold.
  void add(int32_t score, size_t row, size_t end) {
    if (score <= threshold || row >= end) return;
    keys[count++] = make_key(score, static_cast<uint32_t>(row));
    --room;
  }
};

// Whether each of some queries has room for a block more.
inline bool has_room(Found* const* found, size_t count) {
  bool room = true;
  for (size_t q = 0; q < count; ++q) room = room && found[q]->room >= kBlock;
  return room;
}

struct Kernels {
  const char* name;
  // Rows first .. end of packed codes against `count` queries, 1 to kQueries, of 4 x `chunks`
  // signed bytes; first is a multiple of kBlock. The memory behind the last row is readable up to a
  // multiple of kBlock rows. Returns where it stopped.
  size_t (*scan_codes)(const uint8_t* codes, size_t first, size_t end, size_t chunks,
                       const int8_t* const* queries, size_t count, Found* const* found);
  // The same for packed bits; the score is minus the number of bits that differ.
  size_t (*scan_bits)(const uint64_t* bits, size_t first, size_t end, size_t words,
                      const uint64_t* const* queries, size_t count, Found* const* found);
  // For each of kTogether rows: adds the product of n numbers of the row and the query to its dot,
  // and the row's squares to its squares. One row after the other, the CPU waits for memory 1.6
  // times as long.
  void (*dot_half)(const uint16_t* const* rows, const float* query, size_t n, float* dots,
                   float* squares);
  void (*dot_single)(const float* const* rows, const float* query, size_t n, float* dots,
                     float* squares);
};

extern const Kernels kPortable, kAvx2, kVnni, kNeon,
    kDotprod;  // those of this kind of CPU are there

// The best that this CPU has; those that it has, best first, null at the end.
const Kernels* const* available();

}  // namespace matryoshka::search
