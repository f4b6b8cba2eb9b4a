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

constexpr size_t kTileBytes =
    32 << 10;  // of rows that all queries pass over while the nearest caches have them
constexpr size_t kGrouped = 1024;        // queries that pass over the lists together
constexpr size_t kRoomBytes = 64 << 20;  // for the keys of the queries that a thread has in hand
constexpr int32_t kLowest = std::numeric_limits<int32_t>::min();

// The k highest keys of one query.
class Best {
 public:
  Best(size_t k, uint64_t* room, size_t capacity)
      : k_(k), capacity_(capacity), found_{kLowest, room, 0, capacity} {}

  // k: at most `rows`, which is also the most that can be found.
  static size_t capacity(size_t k, size_t rows) {
    return std::max<size_t>(k < rows / 4 ? 4 * k : rows, 256) + kBlock;
  }
  Found& found() { return found_; }

  // tie: rows with the score of the k-th best may still be better, as their ids come in no order.
  void shrink(bool tie) {
    if (found_.count > k_) {
      std::nth_element(found_.keys, found_.keys + (k_ - 1), found_.keys + found_.count,
                       std::greater<uint64_t>());
      found_.count = k_;
      found_.threshold = key_score(found_.keys[k_ - 1]) - (tie ? 1 : 0);
    }
    found_.room = capacity_ - found_.count;
  }

  // Takes out keys from `from` on that `keep` refuses; keep may change them.
  template <class Keep>
  void filter(size_t from, Keep keep) {
    size_t to = from;
    for (size_t i = from; i < found_.count; ++i) {
      uint64_t key = found_.keys[i];
      if (keep(key)) found_.keys[to++] = key;
    }
    found_.room += found_.count - to;
    found_.count = to;
  }

  void write(int64_t* ids, int32_t* scores) {
    const size_t n = std::min(k_, found_.count);
    if (n < found_.count)  // twice as fast as partial_sort
      std::nth_element(found_.keys, found_.keys + n, found_.keys + found_.count,
                       std::greater<uint64_t>());
    std::sort(found_.keys, found_.keys + n, std::greater<uint64_t>());
    for (size_t i = 0; i < k_; ++i) {
      ids[i] = i < n ? static_cast<int64_t>(key_row(found_.keys[i])) : -1;
      scores[i] = i < n ? key_score(found_.keys[i]) : kLowest;
    }
  }

 private:
  size_t k_, capacity_;
  Found found_;
};

// Some queries that pass over the same rows together, kQueries at a time.
class Together {
 public:
  Together(const Kernels& kernels, const Rows& rows, const uint8_t* queries,
           std::vector<Best>& best)
      : kernels_(kernels), rows_(rows), queries_(queries), best_(best) {}

  // Query q of best and queries is one of them; full: `scan` has to come before another one.
  bool add(size_t q) {
    at_[count_] = queries_ + q * rows_.query_bytes();
    mine_[count_] = &best_[q];
    found_[count_] = &mine_[count_]->found();
    return ++count_ == kQueries;
  }

  // keep: whether a new key counts, which it may change. tie: see Best::shrink.
  template <class Keep>
  void scan(size_t first, size_t end, bool tie, Keep keep) {
    while (count_ && first < end) {
      size_t before[kQueries];
      for (size_t i = 0; i < count_; ++i) before[i] = found_[i]->count;
      first = rows_.scan(kernels_, first, end, at_, count_, found_);
      for (size_t i = 0; i < count_; ++i) {
        if (found_[i]->count > before[i]) mine_[i]->filter(before[i], keep);
        if (found_[i]->room < kBlock) mine_[i]->shrink(tie);
      }
    }
    count_ = 0;
  }

 private:
  const Kernels& kernels_;
  const Rows& rows_;
  const uint8_t* queries_;
  std::vector<Best>& best_;
  const uint8_t* at_[kQueries];
  Best* mine_[kQueries];
  Found* found_[kQueries];
  size_t count_ = 0;
};

// How many of `count` queries a thread takes at once.
inline size_t in_hand(size_t count, size_t capacity) {
  return std::max<size_t>(std::min(count, kRoomBytes / sizeof(uint64_t) / capacity), 1);
}

inline bool is_deleted(const Rows& rows, uint32_t row) {
  return rows.deleted && (rows.deleted[row / 64] >> (row % 64) & 1);
}

}  // namespace

void pack(Pool& pool, const uint8_t* codes, size_t rows, size_t chunks, uint8_t* packed) {
  const size_t width = chunks * kChunk, blocks = (rows + kBlock - 1) / kBlock, step = 64;
  pool.run((blocks + step - 1) / step, [&](size_t task, int) {
    const size_t first = task * step * kBlock,
                 last = std::min((task + 1) * step * kBlock, blocks * kBlock);
    for (size_t row = first; row < last; ++row) {
      uint8_t* place = packed + row / kGroup * kGroup * width + row % kGroup * kChunk;
      for (size_t c = 0; c < chunks; ++c, place += kGroup * kChunk) {
        if (row < rows)
          std::memcpy(place, codes + row * width + c * kChunk, kChunk);
        else
          std::memset(place, 0, kChunk);
      }
    }
  });
}

void pack_bits(const uint64_t* bits, size_t rows, size_t words, uint64_t* packed) {
  for (size_t row = 0; row < (rows + kBlock - 1) / kBlock * kBlock; ++row) {
    uint64_t* place = packed + row / kBitGroup * kBitGroup * words + row % kBitGroup;
    for (size_t w = 0; w < words; ++w, place += kBitGroup)
      *place = row < rows ? bits[row * words + w] : 0;
  }
}

void search_all(Pool& pool, const Kernels& kernels, const Rows& rows, const uint8_t* queries,
                size_t count, size_t k, int64_t* ids, int32_t* scores) {
  if (!count || !k) return;
  const auto threads = static_cast<size_t>(pool.num_threads());
  const size_t row_bytes = rows.codes ? rows.width * kChunk : rows.width * 8;
  const size_t tile = std::max(kTileBytes / row_bytes / kBlock, size_t{1}) * kBlock;
  // Many queries: every thread takes some over all rows. Few: every thread takes some of the rows.
  const bool by_query = count >= 4 * threads;
  const size_t capacity = Best::capacity(k, rows.count), bytes = rows.query_bytes();
  const size_t ranges = by_query ? 1 : threads;
  const size_t part = by_query ? in_hand((count + threads - 1) / threads, capacity) : count;
  const size_t parts = (count + part - 1) / part;
  const size_t range = ((rows.count + ranges - 1) / ranges + kBlock - 1) / kBlock * kBlock;

  std::vector<std::vector<Best>> best(ranges * parts);
  std::vector<std::unique_ptr<uint64_t[]>> room(ranges * parts);
  pool.run(ranges * parts, [&](size_t task, int) {
    const size_t begin = task / parts * range, end = std::min(begin + range, rows.count);
    const size_t from = task % parts * part, to = std::min(from + part, count);
    if (from >= to) return;
    room[task].reset(new uint64_t[(to - from) * capacity]);
    for (size_t q = from; q < to; ++q)
      best[task].emplace_back(k, room[task].get() + (q - from) * capacity, capacity);
    Together some(kernels, rows, queries + from * bytes, best[task]);
    for (size_t first = begin; first < end; first += tile)
      for (size_t q = from; q < to; ++q)
        if (some.add(q - from) || q + 1 == to)
          some.scan(first, std::min(first + tile, end), false,
                    [&](uint64_t key) { return !is_deleted(rows, key_row(key)); });
    if (ranges == 1)
      for (size_t q = from; q < to; ++q) best[task][q - from].write(ids + q * k, scores + q * k);
  });
  if (ranges == 1) return;
  std::vector<uint64_t> all;
  for (size_t q = 0; q < count; ++q) {
    all.clear();
    for (auto& range_best : best) {
      if (range_best.empty()) continue;
      const Found& found = range_best[q].found();
      all.insert(all.end(), found.keys, found.keys + found.count);
    }
    all.resize(std::max(all.size(),
                        capacity));  // Best wants a buffer; what is behind `count` is not looked at
    Best merged(k, all.data(), all.size());
    size_t n = 0;
    for (auto& range_best : best) n += range_best.empty() ? 0 : range_best[q].found().count;
    merged.found().count = n;
    merged.write(ids + q * k, scores + q * k);
  }
}

void search_lists(Pool& pool, const Kernels& kernels, const Rows& rows, const Lists& lists,
                  const uint8_t* queries, size_t count, const int32_t* probes, size_t num_probes,
                  size_t k, int64_t* ids, int32_t* scores) {
  if (!count || !k) return;
  for (size_t i = 0; i < count * num_probes; ++i)
    if (probes[i] >= 0 && static_cast<size_t>(probes[i]) >= lists.count)
      throw std::out_of_range("a probe is no list");
  const size_t capacity = Best::capacity(k, lists.num_ids), bytes = rows.query_bytes();
  const auto threads = static_cast<size_t>(pool.num_threads());
  const size_t step = in_hand(std::min((count + threads - 1) / threads, kGrouped), capacity);
  std::vector<std::unique_ptr<uint64_t[]>> rooms(threads);
  pool.run((count + step - 1) / step, [&](size_t task, int thread) {
    const size_t from = task * step, n = std::min(step, count - from);
    auto& room = rooms[static_cast<size_t>(thread)];
    if (!room) room.reset(new uint64_t[step * capacity]);
    std::vector<Best> best;
    for (size_t q = 0; q < n; ++q) best.emplace_back(k, room.get() + q * capacity, capacity);

    std::vector<std::pair<uint32_t, uint32_t>> visits;  // list, query
    const size_t near = (num_probes + 3) / 4;  // first, so that the others meet a high threshold
    for (size_t begin = 0, end = near; begin < num_probes; begin = end, end = num_probes) {
      visits.clear();
      for (size_t q = 0; q < n; ++q)
        for (size_t p = begin; p < end; ++p) {
          const int32_t list = probes[(from + q) * num_probes + p];
          if (list >= 0) visits.emplace_back(static_cast<uint32_t>(list), static_cast<uint32_t>(q));
        }
      // All queries of a list after each other read it from the cache: at 1000 queries over memory
      // of 90 MB 3 times as fast as query after query. A query that names a list twice would be two
      // of those that are scanned together.
      std::sort(visits.begin(), visits.end());
      visits.erase(std::unique(visits.begin(), visits.end()), visits.end());
      Together some(kernels, rows, queries + from * bytes, best);
      for (size_t i = 0; i < visits.size(); ++i) {
        const uint32_t list = visits[i].first;
        if (!some.add(visits[i].second) && i + 1 < visits.size() && visits[i + 1].first == list)
          continue;
        const auto start = static_cast<size_t>(lists.starts[list]);
        some.scan(start, start + static_cast<size_t>(lists.sizes[list]), true, [&](uint64_t& key) {
          const uint32_t id = lists.ids[key_row(key)];
          if (id >= lists.num_ids) throw std::out_of_range("a slot is no row");
          key = make_key(key_score(key), id);
          return !is_deleted(rows, id);
        });
      }
    }
    for (size_t q = 0; q < n; ++q) best[q].write(ids + (from + q) * k, scores + (from + q) * k);
  });
}

namespace {

struct Candidate {
  float score;
  double product, squares;  // of all stages until now
  int64_t id;

  bool operator<(const Candidate& other) const {  // better first
    return score != other.score ? score > other.score : id < other.id;
  }
};

inline const void* row_of(const Stage& stage, int64_t id) {
  const size_t at = static_cast<size_t>(id) * stage.stride + stage.begin;
  return stage.half ? static_cast<const void*>(static_cast<const uint16_t*>(stage.rows) + at)
                    : static_cast<const void*>(static_cast<const float*>(stage.rows) + at);
}

inline void prefetch(const Stage& stage, int64_t id) {
#if defined(__GNUC__)
  const char* place = static_cast<const char*>(row_of(stage, id));
  const size_t bytes = (stage.end - stage.begin) * (stage.half ? 2 : 4);
  for (size_t i = 0; i < std::min<size_t>(bytes, 512); i += 64)
    __builtin_prefetch(place + i);  // then the CPU sees it
#endif
}

// Product and squares of a row that float32 cannot square: 1e-20, or 1e20.
inline void dot_double(const float* row, const float* query, size_t n, double* product,
                       double* squares) {
  *product = *squares = 0;
  for (size_t i = 0; i < n; ++i) {
    *product += static_cast<double>(row[i]) * query[i];
    *squares += static_cast<double>(row[i]) * row[i];
  }
}

inline float sum_of_squares(const float* x,
                            size_t n) {  // eight sums, as one is a chain of additions that wait
  float sums[8] = {};
  size_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (size_t j = 0; j < 8; ++j) sums[j] += x[i + j] * x[i + j];
  for (; i < n; ++i) sums[0] += x[i] * x[i];
  for (size_t j = 1; j < 8; ++j) sums[0] += sums[j];
  return sums[0];
}

// A query that float32 can multiply and square: this one or, by a power of two that no cosine
// notices, a copy.
const float* of_fair_size(const float* query, size_t n, std::vector<float>& copy) {
  const float squares = sum_of_squares(query, n);
  if (squares > 1e-20f && squares < 1e20f) return query;
  float largest = 0;
  for (size_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(query[i]));
  if (!(largest > 0) || std::isinf(largest)) return query;
  copy.resize(n);
  const int exponent = std::ilogb(largest);
  for (size_t i = 0; i < n; ++i) copy[i] = std::ldexp(query[i], -exponent);
  return copy.data();
}

constexpr size_t kAhead = 2 * kTogether;

// The candidates' cosines of one stage more. scale: 1 / the query's length.
void score(const Kernels& kernels, const Stage& stage, const float* query, double scale,
           std::vector<Candidate>& list) {
  const size_t n = stage.end - stage.begin, count = list.size();
  query += stage.begin;
  for (size_t first = 0; first < count; first += kTogether) {
    const void* rows[kTogether];
    float products[kTogether] = {}, squares[kTogether] = {};
    for (size_t r = 0; r < kTogether; ++r) {
      const Candidate& one = list[std::min(first + r, count - 1)];  // the last one fills up
      rows[r] = row_of(stage, one.id);
      if (first + r + kAhead < count) prefetch(stage, list[first + r + kAhead].id);
    }
    if (stage.half)
      kernels.dot_half(reinterpret_cast<const uint16_t* const*>(rows), query, n, products, squares);
    else
      kernels.dot_single(reinterpret_cast<const float* const*>(rows), query, n, products, squares);
    for (size_t r = 0; r < kTogether && first + r < count; ++r) {
      Candidate& one = list[first + r];
      double product = products[r], square = squares[r];
      if (!stage.half && !(square > 1e-30 && square < 1e30))
        dot_double(static_cast<const float*>(rows[r]), query, n, &product, &square);
      one.product += product;
      one.squares += square;
      one.score =
          one.squares > 0 ? static_cast<float>(one.product * scale / std::sqrt(one.squares)) : 0;
      if (std::isnan(one.product) || std::isnan(one.squares))
        one.score = std::numeric_limits<float>::quiet_NaN();
    }
  }
}

}  // namespace

void rerank(Pool& pool, const Kernels& kernels, const std::vector<Stage>& stages, size_t num_rows,
            const float* queries, size_t dim, size_t count, const int64_t* candidates, size_t m,
            int64_t* ids, float* scores) {
  const size_t out = stages.back().keep, step = 4;
  pool.run((count + step - 1) / step, [&](size_t task, int) {
    std::vector<Candidate> list;
    std::vector<float> copy;
    for (size_t q = task * step; q < std::min((task + 1) * step, count); ++q) {
      const float* query = of_fair_size(queries + q * dim, stages.back().end, copy);
      list.clear();
      for (size_t i = 0; i < m; ++i) {
        const int64_t id = candidates[q * m + i];
        if (id < 0) continue;
        if (static_cast<size_t>(id) >= num_rows) throw std::out_of_range("a candidate is no row");
        list.push_back({0, 0, 0, id});
      }
      float length = 0;
      for (const Stage& stage : stages) {
        length += sum_of_squares(query + stage.begin, stage.end - stage.begin);
        score(kernels, stage, query, length > 0 ? 1 / std::sqrt(static_cast<double>(length)) : 0,
              list);
        list.erase(std::remove_if(list.begin(), list.end(),
                                  [](const Candidate& c) { return std::isnan(c.score); }),
                   list.end());
        if (list.size() > stage.keep) {
          std::nth_element(list.begin(), list.begin() + static_cast<ptrdiff_t>(stage.keep),
                           list.end());
          list.resize(stage.keep);
        }
      }
      std::sort(list.begin(), list.end());
      for (size_t i = 0; i < out; ++i) {
        ids[q * out + i] = i < list.size() ? list[i].id : -1;
        scores[q * out + i] =
            i < list.size() ? list[i].score : -std::numeric_limits<float>::infinity();
      }
    }
  });
}

}  // namespace matryoshka::search
