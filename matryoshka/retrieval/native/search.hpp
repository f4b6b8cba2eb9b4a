// Exhaustive search, inverted-file search and re-ranking for many queries on a pool of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../../data/native/pool.hpp"
#include "block_sums.hpp"
#include "scan_kernels.hpp"

namespace matryoshka::search {

// The database: packed codes or packed bits (the layouts are in scan_kernels.hpp).
struct Rows {
  const uint8_t* codes;  // null for bits
  const uint64_t* bits;  // null for codes
  size_t count;
  size_t width;             // chunks, or words
  const uint64_t* deleted;  // one bit per row, or null

  size_t scan(const Kernels& kernels, size_t first, size_t end, const uint8_t* const* queries,
              size_t num_queries, HitBuffer* const* hits) const {
    if (codes) {
      const auto* bytes = reinterpret_cast<const int8_t* const*>(queries);
      return kernels.scan_codes(codes, first, end, width, bytes, num_queries, hits);
    }
    const auto* words = reinterpret_cast<const uint64_t* const*>(queries);
    return kernels.scan_bits(bits, first, end, width, words, num_queries, hits);
  }
  // Bytes of a query, and of a row.
  size_t query_bytes() const { return codes ? width * kChunk : width * 8; }
};

// The lists of an inverted file. List i has the packed rows (slots) starts[i] .. starts[i] +
// sizes[i]; starts are multiples of kBlock.
struct Lists {
  const int64_t* starts;
  const int32_t* sizes;
  const uint32_t* ids;  // of every slot, below num_ids
  size_t count, num_ids;
  // Checksums of the packed codes and of `ids`, or null: lists are checked when they are visited.
  const BlockSums* code_sums;
  const BlockSums* id_sums;
};

// Pack codes [rows, 4 x chunks] of 0 to 127; rows up to a multiple of kBlock become zero.
void pack(Pool& pool, const uint8_t* codes, size_t rows, size_t chunks, uint8_t* packed);

// Pack bits [rows, words]; rows up to a multiple of kBlock become zero.
void pack_bits(const uint64_t* bits, size_t rows, size_t words, uint64_t* packed);

// Find the k best rows of each of `count` queries. Results: ids [count, k], -1 where fewer rows
// exist, and scores [count, k]. Equal scores are ordered by id.
void search_all(Pool& pool, const Kernels& kernels, const Rows& rows, const uint8_t* queries,
                size_t count, size_t k, int64_t* ids, int32_t* scores);

// The same among the lists `probes` [count, num_probes]; those of a query are distinct, -1 marks an
// empty place. Throws std::out_of_range for a probe that is not a list and an id that is not a row.
void search_lists(Pool& pool, const Kernels& kernels, const Rows& rows, const Lists& lists,
                  const uint8_t* queries, size_t count, const int32_t* probes, size_t num_probes,
                  size_t k, int64_t* ids, int32_t* scores);

// One stage of re-ranking: dimensions begin .. end of `rows`, float16 or float32, whose rows are
// `stride` numbers apart. Its best `keep` candidates go to the next stage.
struct Stage {
  const void* rows;
  bool half;
  size_t stride, begin, end, keep;
  const BlockSums* sums;  // of the file with `rows`, or null: rows are checked when they are read

  size_t item() const { return half ? 2 : 4; }
};

// Order the candidates [count, m] (-1: empty) of each query [dim] by the cosine of their first
// `end` dimensions, stage by stage. Results: ids and scores [count, keep of the last stage]. Zero
// vectors have cosine 0; rows with NaN are left out; equal scores are ordered by id. Throws
// std::out_of_range for a candidate outside 0 .. num_rows - 1.
void rerank(Pool& pool, const Kernels& kernels, const std::vector<Stage>& stages, size_t num_rows,
            const float* queries, size_t dim, size_t count, const int64_t* candidates, size_t m,
            int64_t* ids, float* scores);

}  // namespace matryoshka::search
