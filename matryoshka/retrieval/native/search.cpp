#include "search.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <utility>

namespace matryoshka::search {
namespace {

// Rows per tile: a tile stays in the L1 cache (32 to 48 kB) while all queries of a task scan it.
constexpr size_t kTileBytes = 32 << 10;
constexpr size_t kMaxQueriesPerTask = 1024;  // of search_lists
constexpr size_t kMaxKeyBytes = 64 << 20;    // key buffers of one task: see queries_per_task
constexpr int32_t kLowest = std::numeric_limits<int32_t>::min();

size_t divide_up(size_t n, size_t unit) { return (n + unit - 1) / unit; }
size_t round_up(size_t n, size_t unit) { return divide_up(n, unit) * unit; }

// The k highest keys of one query. Keys collect in a buffer of about 4 k; when it is full, a
// selection keeps the best k and raises the threshold. That costs O(1) per key, a heap O(log k).
class TopK {
 public:
  // capacity: from capacity_for, or at least the number of keys that are ever added.
  TopK(size_t k, size_t capacity)
      : k_(k),
        capacity_(capacity),
        buffer_(new uint64_t[capacity]),  // uninitialised: only hits_.count keys are read
        hits_{kLowest, buffer_.get(), 0, capacity} {}

  // k: at most `rows`, which is also the largest possible number of keys.
  static size_t capacity_for(size_t k, size_t rows) {
    const size_t keys = k < rows / 4 ? 4 * k : rows;
    return std::max<size_t>(keys, 256) + kBlock;
  }

  HitBuffer& hits() { return hits_; }
  size_t count() const { return hits_.count; }

  // Forget all keys, for the next query.
  void reset() { hits_ = {kLowest, buffer_.get(), 0, capacity_}; }

  // Keep the best k keys and raise the threshold to the k-th best score. keep_ties: later rows with
  // that same score still count, because their ids come in no order.
  void shrink(bool keep_ties) {
    if (hits_.count > k_) {
      select(k_ - 1);
      hits_.count = k_;
      hits_.threshold = key_score(hits_.keys[k_ - 1]) - (keep_ties ? 1 : 0);
    }
    hits_.room = capacity_ - hits_.count;
  }

  // Remove the keys from index `begin` on that `accept` rejects; accept may change a key.
  template <class Accept>
  void filter(size_t begin, Accept accept) {
    size_t to = begin;
    for (size_t i = begin; i < hits_.count; ++i) {
      uint64_t key = hits_.keys[i];
      if (accept(key)) hits_.keys[to++] = key;
    }
    hits_.room += hits_.count - to;
    hits_.count = to;
  }

  // Add the keys of `other`; the capacity must suffice.
  void append(const TopK& other) {
    std::copy_n(other.hits_.keys, other.hits_.count, hits_.keys + hits_.count);
    hits_.count += other.hits_.count;
    hits_.room -= other.hits_.count;
  }

  // Write k ids and scores, best first; -1 and the lowest score where there are fewer.
  void write(int64_t* ids, int32_t* scores) {
    const size_t n = std::min(k_, hits_.count);
    if (n < hits_.count) select(n);  // then sort: twice as fast as std::partial_sort
    std::sort(hits_.keys, hits_.keys + n, std::greater<uint64_t>());
    for (size_t i = 0; i < n; ++i) {
      const uint64_t key = hits_.keys[i];  // NOLINT(clang-analyzer-security.ArrayBound): n <= count
      ids[i] = static_cast<int64_t>(key_row(key));
      scores[i] = key_score(key);
    }
    std::fill(ids + n, ids + k_, -1);
    std::fill(scores + n, scores + k_, kLowest);
  }

 private:
  // Partition the keys: the `nth` best is at that index, better ones before it.
  void select(size_t nth) {
    uint64_t* const keys = hits_.keys;
    std::nth_element(keys, keys + nth, keys + hits_.count, std::greater<uint64_t>());
  }

  size_t k_, capacity_;
  std::unique_ptr<uint64_t[]> buffer_;
  HitBuffer hits_;
};

// Up to kQueriesPerScan queries that scan the same rows in one pass.
class QueryGroup {
 public:
  QueryGroup(const Kernels& kernels, const Rows& rows, const uint8_t* queries,
             std::vector<TopK>& top)
      : kernels_(kernels), rows_(rows), queries_(queries), top_(top) {}

  // Add query q of `queries`, whose results go to top[q]. True when the group is full: call `scan`
  // then.
  bool add(size_t q) {
    query_[count_] = queries_ + q * rows_.query_bytes();
    result_[count_] = &top_[q];
    hits_[count_] = &top_[q].hits();
    return ++count_ == kQueriesPerScan;
  }

  // Scan the rows [first, end) and empty the group. accept: whether a new key counts, which it may
  // change. keep_ties: see TopK::shrink.
  template <class Accept>
  void scan(size_t first, size_t end, bool keep_ties, Accept accept) {
    while (count_ && first < end) {
      size_t before[kQueriesPerScan];
      for (size_t i = 0; i < count_; ++i) before[i] = hits_[i]->count;
      first = rows_.scan(kernels_, first, end, query_, count_, hits_);
      for (size_t i = 0; i < count_; ++i) {
        if (hits_[i]->count > before[i]) result_[i]->filter(before[i], accept);
        if (hits_[i]->room < kBlock) result_[i]->shrink(keep_ties);
      }
    }
    count_ = 0;
  }

 private:
  const Kernels& kernels_;
  const Rows& rows_;
  const uint8_t* queries_;
  std::vector<TopK>& top_;
  const uint8_t* query_[kQueriesPerScan];
  TopK* result_[kQueriesPerScan];
  HitBuffer* hits_[kQueriesPerScan];
  size_t count_ = 0;
};

// How many of `count` queries a task takes: as many as kMaxKeyBytes has buffers for, at least one.
inline size_t queries_per_task(size_t count, size_t capacity) {
  const size_t buffers = kMaxKeyBytes / sizeof(uint64_t) / capacity;
  return std::max<size_t>(std::min(count, buffers), 1);
}

inline bool is_deleted(const Rows& rows, uint32_t row) {
  return rows.deleted && (rows.deleted[row / 64] >> (row % 64) & 1);
}

// How search_all cuts its work into tasks: with many queries, each task scans all rows for some of
// them; with few, each task scans a range of the rows for all of them, and the results are merged.
struct Tiling {
  size_t num_ranges, range_rows;   // range_rows: a multiple of kBlock
  size_t num_parts, part_queries;  // of the queries
  size_t tile_rows;                // scanned for all queries of the task before the next tile

  static Tiling choose(const Rows& rows, size_t num_queries, size_t capacity, size_t threads) {
    // With fewer than 4 queries per thread, the last query of one thread leaves the others idle.
    const bool by_query = num_queries >= 4 * threads;
    Tiling t;
    t.num_ranges = by_query ? 1 : threads;
    t.range_rows = round_up(divide_up(rows.count, t.num_ranges), kBlock);
    t.part_queries =
        by_query ? queries_per_task(divide_up(num_queries, threads), capacity) : num_queries;
    t.num_parts = divide_up(num_queries, t.part_queries);
    t.tile_rows = std::max<size_t>(kTileBytes / rows.query_bytes() / kBlock, 1) * kBlock;
    return t;
  }
  size_t num_tasks() const { return num_ranges * num_parts; }
};

// Scan the rows [begin, end), tile by tile, for queries 0 .. top.size() - 1.
void scan_task(const Kernels& kernels, const Rows& rows, size_t begin, size_t end, size_t tile_rows,
               const uint8_t* queries, std::vector<TopK>& top) {
  const auto accept = [&](uint64_t key) { return !is_deleted(rows, key_row(key)); };
  QueryGroup group(kernels, rows, queries, top);
  for (size_t first = begin; first < end; first += tile_rows) {
    const size_t tile_end = std::min(first + tile_rows, end);
    for (size_t q = 0; q < top.size(); ++q) {
      const bool full = group.add(q);
      if (full || q + 1 == top.size()) group.scan(first, tile_end, false, accept);
    }
  }
}

// Merge the results that every range of rows has for each query. top: [range][query].
void merge_ranges(const std::vector<std::vector<TopK>>& top, size_t num_queries, size_t k,
                  int64_t* ids, int32_t* scores) {
  for (size_t q = 0; q < num_queries; ++q) {
    size_t total = 0;
    for (const auto& range : top) total += range[q].count();
    TopK merged(k, total);
    for (const auto& range : top) merged.append(range[q]);
    merged.write(ids + q * k, scores + q * k);
  }
}

}  // namespace

void pack(Pool& pool, const uint8_t* codes, size_t rows, size_t chunks, uint8_t* packed) {
  constexpr size_t kTaskRows = 64 * kBlock;
  const size_t width = chunks * kChunk;
  const size_t padded = round_up(rows, kBlock);
  pool.run(divide_up(padded, kTaskRows), [&](size_t task, int) {
    const size_t first = task * kTaskRows;
    const size_t last = std::min(first + kTaskRows, padded);
    for (size_t row = first; row < last; ++row) {
      uint8_t* to = packed + row / kGroup * kGroup * width + row % kGroup * kChunk;
      for (size_t c = 0; c < chunks; ++c, to += kGroup * kChunk) {
        if (row < rows) {
          std::memcpy(to, codes + row * width + c * kChunk, kChunk);
        } else {
          std::memset(to, 0, kChunk);
        }
      }
    }
  });
}

void pack_bits(const uint64_t* bits, size_t rows, size_t words, uint64_t* packed) {
  const size_t padded = round_up(rows, kBlock);
  for (size_t row = 0; row < padded; ++row) {
    uint64_t* to = packed + row / kBitGroup * kBitGroup * words + row % kBitGroup;
    for (size_t w = 0; w < words; ++w, to += kBitGroup) {
      *to = row < rows ? bits[row * words + w] : 0;
    }
  }
}

void search_all(Pool& pool, const Kernels& kernels, const Rows& rows, const uint8_t* queries,
                size_t count, size_t k, int64_t* ids, int32_t* scores) {
  if (!count || !k) return;
  const size_t capacity = TopK::capacity_for(k, rows.count);
  const auto threads = static_cast<size_t>(pool.num_threads());
  const Tiling tiling = Tiling::choose(rows, count, capacity, threads);

  std::vector<std::vector<TopK>> top(tiling.num_tasks());
  pool.run(tiling.num_tasks(), [&](size_t task, int) {
    const size_t first_row = task / tiling.num_parts * tiling.range_rows;
    const size_t end_row = std::min(first_row + tiling.range_rows, rows.count);
    const size_t first_query = task % tiling.num_parts * tiling.part_queries;
    const size_t end_query = std::min(first_query + tiling.part_queries, count);
    std::vector<TopK>& task_top = top[task];
    task_top.reserve(end_query - first_query);
    for (size_t q = first_query; q < end_query; ++q) task_top.emplace_back(k, capacity);
    const uint8_t* part = queries + first_query * rows.query_bytes();
    scan_task(kernels, rows, first_row, end_row, tiling.tile_rows, part, task_top);
    if (tiling.num_ranges > 1) return;  // merged below
    for (size_t q = first_query; q < end_query; ++q) {
      task_top[q - first_query].write(ids + q * k, scores + q * k);
    }
    task_top.clear();
  });
  if (tiling.num_ranges > 1) merge_ranges(top, count, k, ids, scores);
}

namespace {

struct Visit {
  uint32_t list, query;
  bool operator<(const Visit& other) const {
    return list != other.list ? list < other.list : query < other.query;
  }
  bool operator==(const Visit& other) const { return list == other.list && query == other.query; }
};

// The lists that queries [0, num_queries) probe at positions [begin, end), sorted by list. All
// queries of a list follow each other, so that its rows come from the cache: with 1,000 queries
// over 90 MB of codes, 3 times as fast as query after query. Duplicates are removed because one
// group must not hold a query twice.
void collect_visits(const int32_t* probes, size_t num_probes, size_t num_queries, size_t begin,
                    size_t end, std::vector<Visit>& visits) {
  visits.clear();
  for (size_t q = 0; q < num_queries; ++q) {
    for (size_t p = begin; p < end; ++p) {
      const int32_t list = probes[q * num_probes + p];
      if (list < 0) continue;  // fewer probes than num_probes
      visits.push_back({static_cast<uint32_t>(list), static_cast<uint32_t>(q)});
    }
  }
  std::sort(visits.begin(), visits.end());
  visits.erase(std::unique(visits.begin(), visits.end()), visits.end());
}

}  // namespace

void search_lists(Pool& pool, const Kernels& kernels, const Rows& rows, const Lists& lists,
                  const uint8_t* queries, size_t count, const int32_t* probes, size_t num_probes,
                  size_t k, int64_t* ids, int32_t* scores) {
  if (!count || !k) return;
  for (size_t i = 0; i < count * num_probes; ++i) {
    if (probes[i] >= 0 && static_cast<size_t>(probes[i]) >= lists.count)
      throw std::out_of_range("probe index out of range");
  }
  const size_t capacity = TopK::capacity_for(k, lists.num_ids);
  const auto threads = static_cast<size_t>(pool.num_threads());
  const size_t step =
      queries_per_task(std::min(divide_up(count, threads), kMaxQueriesPerTask), capacity);

  // Packed rows have slot numbers; results have row ids.
  const auto accept = [&](uint64_t& key) {
    const uint32_t id = lists.ids[key_row(key)];
    if (id >= lists.num_ids) throw std::out_of_range("row id out of range");
    key = make_key(key_score(key), id);
    return !is_deleted(rows, id);
  };

  std::vector<std::vector<TopK>> top_of_thread(threads);  // buffers are reused from task to task
  pool.run(divide_up(count, step), [&](size_t task, int thread) {
    const size_t first_query = task * step;
    const size_t n = std::min(step, count - first_query);
    std::vector<TopK>& top = top_of_thread[static_cast<size_t>(thread)];
    top.reserve(n);
    while (top.size() < n) top.emplace_back(k, capacity);
    for (size_t q = 0; q < n; ++q) top[q].reset();

    const int32_t* my_probes = probes + first_query * num_probes;
    QueryGroup group(kernels, rows, queries + first_query * rows.query_bytes(), top);
    std::vector<Visit> visits;
    // The nearest quarter of the lists goes first: it raises the thresholds that the others meet.
    const size_t bounds[] = {0, (num_probes + 3) / 4, num_probes};
    for (size_t phase = 0; phase < 2; ++phase) {
      collect_visits(my_probes, num_probes, n, bounds[phase], bounds[phase + 1], visits);
      for (size_t i = 0; i < visits.size(); ++i) {
        const uint32_t list = visits[i].list;
        const bool full = group.add(visits[i].query);
        const bool last_of_list = i + 1 == visits.size() || visits[i + 1].list != list;
        if (!full && !last_of_list) continue;
        const auto start = static_cast<size_t>(lists.starts[list]);
        const auto size = static_cast<size_t>(lists.sizes[list]);
        const size_t read = round_up(size, kBlock);  // the kernels read whole blocks
        const size_t width = rows.query_bytes();
        if (lists.code_sums) lists.code_sums->check(start * width, (start + read) * width);
        if (lists.id_sums) lists.id_sums->check(4 * start, 4 * (start + size));
        group.scan(start, start + size, true, accept);
      }
    }
    for (size_t q = 0; q < n; ++q) {
      top[q].write(ids + (first_query + q) * k, scores + (first_query + q) * k);
    }
  });
}

// ---- re-ranking ----

namespace {

struct Candidate {
  float score;
  double product, squares;  // sums over the stages so far
  int64_t id;

  bool operator<(const Candidate& other) const {  // better first
    return score != other.score ? score > other.score : id < other.id;
  }
};

inline const void* row_of(const Stage& stage, int64_t id) {
  const size_t at = static_cast<size_t>(id) * stage.stride + stage.begin;
  if (stage.half) return static_cast<const uint16_t*>(stage.rows) + at;
  return static_cast<const float*>(stage.rows) + at;
}

inline void prefetch(const Stage& stage, int64_t id) {
#if defined(__GNUC__)
  const char* row = static_cast<const char*>(row_of(stage, id));
  const size_t bytes = (stage.end - stage.begin) * (stage.half ? 2 : 4);
  // After eight lines the CPU's own prefetcher has recognised the stream.
  for (size_t i = 0; i < std::min<size_t>(bytes, 512); i += 64) __builtin_prefetch(row + i);
#endif
}

// Dot product and sum of squares in double, for rows whose squares float32 cannot hold (values of
// about 1e-20 or 1e20).
inline void dot_double(const float* row, const float* query, size_t n, double* product,
                       double* squares) {
  *product = 0;
  *squares = 0;
  for (size_t i = 0; i < n; ++i) {
    *product += static_cast<double>(row[i]) * query[i];
    *squares += static_cast<double>(row[i]) * row[i];
  }
}

// Eight partial sums: a single one is a chain of additions that wait for each other.
inline float sum_of_squares(const float* x, size_t n) {
  float sums[8] = {};
  size_t i = 0;
  for (; i + 8 <= n; i += 8) {
    for (size_t j = 0; j < 8; ++j) sums[j] += x[i + j] * x[i + j];
  }
  for (; i < n; ++i) sums[0] += x[i] * x[i];
  for (size_t j = 1; j < 8; ++j) sums[0] += sums[j];
  return sums[0];
}

// The query itself if float32 can square it, else a copy scaled by a power of two, which leaves
// every cosine unchanged.
const float* rescale_query(const float* query, size_t n, std::vector<float>& copy) {
  const float squares = sum_of_squares(query, n);
  if (squares > 1e-20f && squares < 1e20f) return query;
  float largest = 0;
  for (size_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(query[i]));
  if (!(largest > 0) || std::isinf(largest)) return query;  // all zero, NaN or infinite
  copy.resize(n);
  const int exponent = std::ilogb(largest);
  for (size_t i = 0; i < n; ++i) copy[i] = std::ldexp(query[i], -exponent);
  return copy.data();
}

constexpr size_t kPrefetchDistance = 2 * kRowsPerDot;

// Add one stage's dimensions to the candidates' sums and update their cosines. scale: 1 / the
// query's length.
void score_stage(const Kernels& kernels, const Stage& stage, const float* query, double scale,
                 std::vector<Candidate>& candidates) {
  const size_t n = stage.end - stage.begin;
  const size_t count = candidates.size();
  query += stage.begin;
  for (size_t first = 0; first < count; first += kRowsPerDot) {
    const void* rows[kRowsPerDot];
    float products[kRowsPerDot] = {};
    float squares[kRowsPerDot] = {};
    for (size_t r = 0; r < kRowsPerDot; ++r) {
      // The last candidate fills up the last, shorter group.
      rows[r] = row_of(stage, candidates[std::min(first + r, count - 1)].id);
      const size_t ahead = first + r + kPrefetchDistance;
      if (ahead < count) prefetch(stage, candidates[ahead].id);
    }
    if (stage.half) {
      const auto* half_rows = reinterpret_cast<const uint16_t* const*>(rows);
      kernels.dot_half(half_rows, query, n, products, squares);
    } else {
      const auto* single_rows = reinterpret_cast<const float* const*>(rows);
      kernels.dot_single(single_rows, query, n, products, squares);
    }

    for (size_t r = 0; r < kRowsPerDot && first + r < count; ++r) {
      Candidate& c = candidates[first + r];
      double product = products[r];
      double square = squares[r];
      const bool in_range = square > 1e-30 && square < 1e30;
      if (!stage.half && !in_range)
        dot_double(static_cast<const float*>(rows[r]), query, n, &product, &square);
      c.product += product;
      c.squares += square;
      c.score = c.squares > 0 ? static_cast<float>(c.product * scale / std::sqrt(c.squares)) : 0;
      if (std::isnan(c.product) || std::isnan(c.squares))
        c.score = std::numeric_limits<float>::quiet_NaN();
    }
  }
}

// Compare the blocks of all candidates' rows with their checksums. Throws DamagedBlock.
void check_rows(const Stage& stage, const std::vector<Candidate>& candidates) {
  for (const Candidate& c : candidates) {
    const auto* row = static_cast<const uint8_t*>(row_of(stage, c.id));
    const auto first = static_cast<size_t>(row - stage.sums->data);
    stage.sums->check(first, first + (stage.end - stage.begin) * stage.item());
  }
}

// Score all candidates with each stage in turn; each keeps its best `keep`, without NaN.
void run_stages(const Kernels& kernels, const std::vector<Stage>& stages, const float* query,
                std::vector<Candidate>& candidates) {
  float length = 0;  // squared
  for (const Stage& stage : stages) {
    length += sum_of_squares(query + stage.begin, stage.end - stage.begin);
    const double scale = length > 0 ? 1 / std::sqrt(static_cast<double>(length)) : 0;
    if (stage.sums) check_rows(stage, candidates);
    score_stage(kernels, stage, query, scale, candidates);
    const auto valid_end = std::remove_if(candidates.begin(), candidates.end(),
                                          [](const Candidate& c) { return std::isnan(c.score); });
    candidates.erase(valid_end, candidates.end());
    if (candidates.size() > stage.keep) {
      const auto nth = candidates.begin() + static_cast<ptrdiff_t>(stage.keep);
      std::nth_element(candidates.begin(), nth, candidates.end());
      candidates.resize(stage.keep);
    }
  }
  std::sort(candidates.begin(), candidates.end());
}

}  // namespace

void rerank(Pool& pool, const Kernels& kernels, const std::vector<Stage>& stages, size_t num_rows,
            const float* queries, size_t dim, size_t count, const int64_t* candidates, size_t m,
            int64_t* ids, float* scores) {
  constexpr size_t kQueriesPerTask = 4;
  const size_t k = stages.back().keep;
  pool.run(divide_up(count, kQueriesPerTask), [&](size_t task, int) {
    std::vector<Candidate> list;
    std::vector<float> copy;
    const size_t end = std::min((task + 1) * kQueriesPerTask, count);
    for (size_t q = task * kQueriesPerTask; q < end; ++q) {
      const float* query = rescale_query(queries + q * dim, stages.back().end, copy);
      list.clear();
      for (size_t i = 0; i < m; ++i) {
        const int64_t id = candidates[q * m + i];
        if (id < 0) continue;  // a missing candidate
        if (static_cast<size_t>(id) >= num_rows)
          throw std::out_of_range("candidate id out of range");
        list.push_back({0, 0, 0, id});
      }
      run_stages(kernels, stages, query, list);
      for (size_t i = 0; i < k; ++i) {
        ids[q * k + i] = i < list.size() ? list[i].id : -1;
        scores[q * k + i] =
            i < list.size() ? list[i].score : -std::numeric_limits<float>::infinity();
      }
    }
  });
}

}  // namespace matryoshka::search
