// The Python module matryoshka.retrieval._native: argument checks, memory and the GIL. The search
// itself is in search.cpp.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "block_sums.hpp"
#include "search.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace matryoshka::search {
namespace {

template <class T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using MutableVector = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<nb::ro, nb::ndim<2>, nb::device::cpu>;
using StageArgs = std::tuple<Table, size_t, size_t, size_t>;  // rows, begin, end, keep
using Deleted = std::optional<Vector<uint64_t>>;
// The bytes of a file, a checksum of each of its blocks, the state of each block, bytes of a block.
using SumsArgs =
    std::optional<std::tuple<Vector<uint8_t>, Vector<uint64_t>, MutableVector<uint8_t>, size_t>>;

// ---- checks ----

void require(bool condition, const char* text) {
  if (!condition) throw nb::value_error(text);
}

// The kernels of this name; the fastest for an empty one.
const Kernels& kernels_named(const std::string& name) {
  const Kernels* const* list = available_kernels();
  if (name.empty()) return **list;
  for (; *list; ++list) {
    if (name == (*list)->name) return **list;
  }
  throw nb::value_error(("kernels='" + name + "': not available on this CPU").c_str());
}

size_t padded(size_t rows) { return (rows + kBlock - 1) / kBlock * kBlock; }

void require_code_dim(size_t dim) {
  require(dim >= kChunk && dim % kChunk == 0, "codes: expected a multiple of 4 dimensions");
}

void require_row_count(size_t count) {
  require(count <= std::numeric_limits<uint32_t>::max(),
          "more rows than an index can number (4294967295)");
}

const uint64_t* deleted_bits(const Deleted& deleted, size_t rows) {
  if (!deleted) return nullptr;
  require(deleted->size() >= (rows + 63) / 64, "deleted has fewer bits than there are rows");
  return deleted->data();
}

std::optional<BlockSums> block_sums(const SumsArgs& args) {
  if (!args) return std::nullopt;
  const auto& [data, sums, state, block] = *args;
  require(block >= 1, "blocks: expected at least one byte each");
  const BlockSums found{data.data(), data.size(), block, sums.data(), state.data()};
  require(sums.size() == found.count() && state.size() == found.count(),
          "blocks: sums and state must have one entry for each block");
  return found;
}

const BlockSums* pointer_to(const std::optional<BlockSums>& sums) {
  return sums ? &*sums : nullptr;
}

// Whether all of a table is inside the bytes that checksums are of.
bool covers(const BlockSums& sums, const Stage& stage, size_t rows, size_t columns) {
  const auto* first = static_cast<const uint8_t*>(stage.rows);
  if (first < sums.data || first > sums.data + sums.size || !rows) return false;
  const size_t numbers = (rows - 1) * stage.stride + columns;
  return numbers * stage.item() <= sums.size - static_cast<size_t>(first - sums.data);
}

Rows code_rows(const Vector<uint8_t>& packed, size_t count, size_t dim, const Deleted& deleted) {
  require_code_dim(dim);
  require_row_count(count);
  require(packed.size() >= padded(count) * dim, "packed has fewer codes than `count` rows");
  return {packed.data(), nullptr, count, dim / kChunk, deleted_bits(deleted, count)};
}

Stage checked_stage(const Table& table, size_t begin, size_t end, size_t keep) {
  const auto type = table.dtype();
  const bool is_float = type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float);
  require(is_float && (type.bits == 16 || type.bits == 32), "rows must be float16 or float32");
  require(table.stride(1) == 1 || table.shape(1) == 1, "the numbers of a row must be contiguous");
  require(table.stride(0) >= 0, "rows must not have a negative stride");
  require(keep >= 1, "a stage must keep at least one candidate");
  const auto stride = static_cast<size_t>(table.stride(0));
  return {table.data(), type.bits == 16, stride, begin, end, keep, nullptr};
}

// ---- results ----

// A new [rows, columns] array.
template <class T>
auto new_matrix(size_t rows, size_t columns) {
  require(columns <= (size_t{1} << 40) / (rows ? rows : 1), "more results than memory could hold");
  std::unique_ptr<T[]> memory(new T[rows * columns]);
  nb::capsule owner(memory.get(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::ndarray<nb::numpy, T, nb::ndim<2>>(memory.release(), {rows, columns}, owner);
}

// Run search(ids, scores) without the GIL; return the two arrays, both [queries, k].
template <class Score, class Search>
nb::tuple run_search(size_t queries, size_t k, Search search) {
  auto ids = new_matrix<int64_t>(queries, k);
  auto scores = new_matrix<Score>(queries, k);
  {
    nb::gil_scoped_release release;
    search(ids.data(), scores.data());
  }
  return nb::make_tuple(ids, scores);
}

template <class T>
const uint8_t* as_bytes(const Matrix<T>& queries) {
  return reinterpret_cast<const uint8_t*>(queries.data());
}

// ---- functions of the module ----

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const Kernels* const* list = available_kernels(); *list; ++list) {
    names.emplace_back((*list)->name);
  }
  return names;
}

void pack_codes(Pool& pool, const Matrix<uint8_t>& codes, const MutableVector<uint8_t>& packed) {
  const size_t rows = codes.shape(0);
  const size_t dim = codes.shape(1);
  require_code_dim(dim);
  require(packed.size() >= padded(rows) * dim, "packed is too small");
  nb::gil_scoped_release release;
  pack(pool, codes.data(), rows, dim / kChunk, packed.data());
}

void pack_bit_rows(const Matrix<uint64_t>& bits, const MutableVector<uint64_t>& packed) {
  const size_t rows = bits.shape(0);
  const size_t words = bits.shape(1);
  require(words >= 1, "bits: expected at least one word per row");
  require(packed.size() >= padded(rows) * words, "packed is too small");
  nb::gil_scoped_release release;
  pack_bits(bits.data(), rows, words, packed.data());
}

nb::tuple search_codes(Pool& pool, const Vector<uint8_t>& packed, size_t count,
                       const Matrix<int8_t>& queries, size_t k, const Deleted& deleted,
                       const std::string& kernels) {
  const Rows rows = code_rows(packed, count, queries.shape(1), deleted);
  const Kernels& chosen = kernels_named(kernels);
  const size_t num_queries = queries.shape(0);
  return run_search<int32_t>(num_queries, k, [&](int64_t* ids, int32_t* scores) {
    search_all(pool, chosen, rows, as_bytes(queries), num_queries, k, ids, scores);
  });
}

nb::tuple search_bits(Pool& pool, const Vector<uint64_t>& packed, size_t count,
                      const Matrix<uint64_t>& queries, size_t k, const Deleted& deleted,
                      const std::string& kernels) {
  const size_t words = queries.shape(1);
  require(words >= 1, "bits: expected at least one word per row");
  require_row_count(count);
  require(packed.size() >= padded(count) * words, "packed has fewer bits than `count` rows");
  const Rows rows{nullptr, packed.data(), count, words, deleted_bits(deleted, count)};
  const Kernels& chosen = kernels_named(kernels);
  const size_t num_queries = queries.shape(0);
  return run_search<int32_t>(num_queries, k, [&](int64_t* ids, int32_t* scores) {
    search_all(pool, chosen, rows, as_bytes(queries), num_queries, k, ids, scores);
  });
}

nb::tuple search_inverted_lists(Pool& pool, const Vector<uint8_t>& packed,
                                const Vector<int64_t>& starts, const Vector<int32_t>& sizes,
                                const Vector<uint32_t>& ids_of_slots, size_t num_ids,
                                const Matrix<int8_t>& queries, const Matrix<int32_t>& probes,
                                size_t k, const Deleted& deleted, const std::string& kernels,
                                const SumsArgs& code_blocks, const SumsArgs& id_blocks) {
  const auto code_sums = block_sums(code_blocks);
  const auto id_sums = block_sums(id_blocks);
  require(!code_sums || (code_sums->data == packed.data() && code_sums->size == packed.size()),
          "blocks: are not those of the packed codes");
  require(!id_sums || (id_sums->data == reinterpret_cast<const uint8_t*>(ids_of_slots.data()) &&
                       id_sums->size == 4 * ids_of_slots.size()),
          "blocks: are not those of the ids");
  const size_t slots = ids_of_slots.size();
  Rows rows = code_rows(packed, slots, queries.shape(1), std::nullopt);
  rows.deleted = deleted_bits(deleted, num_ids);  // by id, not by slot
  require(starts.size() == sizes.size(), "starts and sizes have different lengths");
  require(probes.shape(0) == queries.shape(0), "probes and queries have different lengths");
  const auto last = static_cast<int64_t>(slots);
  for (size_t i = 0; i < starts.size(); ++i) {
    const int64_t start = starts(i);
    const int64_t size = sizes(i);
    // start + size could overflow.
    const bool inside = start >= 0 && size >= 0 && size <= last && start <= last - size;
    require(inside && start % static_cast<int64_t>(kBlock) == 0,
            "a list is outside of the packed codes or does not start at a multiple of 64");
  }
  const Lists lists{starts.data(), sizes.data(),          ids_of_slots.data(), starts.size(),
                    num_ids,       pointer_to(code_sums), pointer_to(id_sums)};
  const Kernels& chosen = kernels_named(kernels);
  const size_t num_queries = queries.shape(0);
  return run_search<int32_t>(num_queries, k, [&](int64_t* ids, int32_t* scores) {
    search_lists(pool, chosen, rows, lists, as_bytes(queries), num_queries, probes.data(),
                 probes.shape(1), k, ids, scores);
  });
}

nb::tuple rerank_candidates(Pool& pool, const std::vector<StageArgs>& stages,
                            const Matrix<float>& queries, const Matrix<int64_t>& candidates,
                            const std::string& kernels, const SumsArgs& blocks) {
  const auto sums = block_sums(blocks);
  require(!stages.empty(), "stages: expected at least one");
  require(candidates.shape(0) == queries.shape(0), "candidates and queries have different lengths");
  const size_t num_rows = std::get<Table>(stages[0]).shape(0);
  std::vector<Stage> checked;
  size_t previous_end = 0;
  for (const auto& [table, begin, end, keep] : stages) {
    checked.push_back(checked_stage(table, begin, end, keep));
    const bool inside = end <= table.shape(1) && end <= queries.shape(1);
    require(begin == previous_end && begin < end && inside,
            "stages must follow each other inside the rows and the queries");
    require(table.shape(0) == num_rows, "stages have different numbers of rows");
    if (sums && covers(*sums, checked.back(), num_rows, table.shape(1)))
      checked.back().sums = &*sums;
    previous_end = end;
  }
  const Kernels& chosen = kernels_named(kernels);
  const size_t num_queries = queries.shape(0);
  return run_search<float>(num_queries, checked.back().keep, [&](int64_t* ids, float* scores) {
    rerank(pool, chosen, checked, num_rows, queries.data(), queries.shape(1), num_queries,
           candidates.data(), candidates.shape(1), ids, scores);
  });
}

void check_blocks(Pool& pool, const SumsArgs& blocks, size_t begin, size_t end) {
  const auto found = block_sums(blocks);
  const BlockSums* const sums = pointer_to(found);
  require(sums && begin <= end && end <= sums->size, "the bytes are outside of the file");
  nb::gil_scoped_release release;
  if (begin == 0 && end == sums->size) {
    sums->check_all(pool);
  } else {
    sums->check(begin, end);
  }
}

nb::object sums_of_blocks(Pool& pool, const Vector<uint8_t>& data, size_t block) {
  require(block >= 1, "blocks: expected at least one byte each");
  const size_t count = (data.size() + block - 1) / block;
  std::unique_ptr<uint64_t[]> memory(new uint64_t[count]);
  {
    nb::gil_scoped_release release;
    sum_blocks(pool, data.data(), data.size(), block, memory.get());
  }
  nb::capsule owner(memory.get(), [](void* p) noexcept { delete[] static_cast<uint64_t*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, uint64_t, nb::ndim<1>>(memory.release(), {count}, owner));
}

}  // namespace
}  // namespace matryoshka::search

NB_MODULE(_native, m) {
  using namespace matryoshka;
  using namespace matryoshka::search;
  m.doc() = "Packed scans, inverted-file search and re-ranking, on threads, without the GIL.";
  m.attr("BLOCK") = kBlock;
  m.attr("CHUNK") = kChunk;

  nb::class_<Pool>(m, "Pool", "Threads that searches run on; they end with this object.")
      .def(nb::init<int>(), "num_threads"_a)
      .def_prop_ro("num_threads", &Pool::num_threads);

  const nb::exception<DamagedBlock> damaged_block(m, "DamagedBlock", PyExc_RuntimeError);
  m.def("check_blocks", &check_blocks, "pool"_a, "blocks"_a, "begin"_a, "end"_a,
        "Compare the blocks of the bytes begin .. end; DamagedBlock if one differs.");
  m.def("sum_blocks", &sums_of_blocks, "pool"_a, "data"_a, "block"_a,
        "XXH64 of each block, uint64 [blocks].");

  m.def("kernels", &kernel_names, "Names of the kernels that this CPU can run, fastest first.");
  m.def("pack", &pack_codes, "pool"_a, "codes"_a, "packed"_a,
        "Pack uint8 codes [rows, dim], 0 to 127, into `packed`.");
  m.def("pack_bits", &pack_bit_rows, "bits"_a, "packed"_a,
        "Pack uint64 words of bits [rows, words] into `packed`.");
  m.def("search_codes", &matryoshka::search::search_codes, "pool"_a, "packed"_a, "count"_a,
        "queries"_a, "k"_a, "deleted"_a = nb::none(), "kernels"_a = "",
        "The k rows with the highest dot products: ids and scores [queries, k].");
  m.def("search_bits", &matryoshka::search::search_bits, "pool"_a, "packed"_a, "count"_a,
        "queries"_a, "k"_a, "deleted"_a = nb::none(), "kernels"_a = "",
        "The k rows with the lowest Hamming distances: ids and negated distances [queries, k].");
  m.def("search_lists", &search_inverted_lists, "pool"_a, "packed"_a, "starts"_a, "sizes"_a,
        "ids"_a, "num_ids"_a, "queries"_a, "probes"_a, "k"_a, "deleted"_a = nb::none(),
        "kernels"_a = "", "code_blocks"_a = nb::none(), "id_blocks"_a = nb::none(),
        "search_codes among the rows of the lists `probes` [queries, num_probes].");
  m.def("rerank", &rerank_candidates, "pool"_a, "stages"_a, "queries"_a, "candidates"_a,
        "kernels"_a = "", "blocks"_a = nb::none(),
        "Order candidates by cosine, stage by stage: ids and scores [queries, keep of the last].");
}
