// Searches over many rows for many queries, on a pool of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../../data/native/pool.hpp"
#include "scan_kernels.hpp"

namespace matryoshka::search {

// Stored rows, packed codes or bits. deleted: one bit for each row, or null.
struct Rows {
  const uint8_t* codes;  // packed; or null
  const uint64_t* bits;  // packed; or null
  size_t count;
  size_t width;  // chunks, or words
  const uint64_t* deleted;

  size_t scan(const Kernels& kernels, size_t first, size_t end, const uint8_t* const* queries,
              size_t n, Found* const* found) const {
    if (codes)
      return kernels.scan_codes(codes, first, end, width,
                                reinterpret_cast<const int8_t* const*>(queries), n, found);
    return kernels.scan_bits(bits, first, end, width,
                             reinterpret_cast<const uint64_t* const*>(queries), n, found);
  }
  size_t query_bytes() const { return codes ? width * kChunk : width * 8; }
};

// Lists of an inverted file. Slots of list i are starts[i] .. starts[i] + sizes[i], starts are
// multiples of kBlock.
struct Lists {
  const int64_t* starts;
  const int32_t* sizes;
  const uint32_t* ids;  // of every slot, below num_ids
  size_t count, num_ids;
};

// Packs codes [rows, 4 x chunks] of 0 to 127 into `packed`, which holds zeros for rows up to a
// multiple of kBlock.
void pack(Pool& pool, const uint8_t* codes, size_t rows, size_t chunks, uint8_t* packed);

// The same for bits [rows, words].
void pack_bits(const uint64_t* bits, size_t rows, size_t words, uint64_t* packed);

// The k best rows for each of `count` queries: ids [count, k], -1 where there are fewer, and
// scores. Ties by id.
void search_all(Pool& pool, const Kernels& kernels, const Rows& rows, const uint8_t* queries,
                size_t count, size_t k, int64_t* ids, int32_t* scores);

// The same among the lists `probes` [count, num_probes], all different, -1 for none.
// std::out_of_range for an id that is no row.
void search_lists(Pool& pool, const Kernels& kernels, const Rows& rows, const Lists& lists,
                  const uint8_t* queries, size_t count, const int32_t* probes, size_t num_probes,
                  size_t k, int64_t* ids, int32_t* scores);

// A stage of re-ranking: dimensions begin .. end of `rows`, float16 or float32, whose rows are
// `stride` numbers apart.
struct Stage {
  const void* rows;
  bool half;
  size_t stride, begin, end, keep;
};

// Orders candidates [count, m] (-1: none) of each query [dim] by cosine of their first `end`
// dimensions, stage by stage; each keeps `keep` of them. out ids and scores [count, keep of the
// last stage]. Zero vectors have cosine 0, rows with NaN are left out. Ties by id. A candidate
// outside of 0 .. num_rows - 1 throws std::out_of_range.
void rerank(Pool& pool, const Kernels& kernels, const std::vector<Stage>& stages, size_t num_rows,
            const float* queries, size_t dim, size_t count, const int64_t* candidates, size_t m,
            int64_t* ids, float* scores);

}  // namespace matryoshka::search
