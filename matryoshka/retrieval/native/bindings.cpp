// The Python module matryoshka.retrieval._native: argument checks, memory, and the GIL. No search
// happens here.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "search.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace matryoshka::search {
namespace {

template <class T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Matrix = nb::ndarray<const T, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<nb::ro, nb::ndim<2>, nb::device::cpu>;
using Deleted = std::optional<Vector<uint64_t>>;

void require(bool condition, const char* text) {
  if (!condition) throw nb::value_error(text);
}

const Kernels& kernels_named(const std::string& name) {
  const Kernels* const* one = available();
  if (name.empty()) return **one;
  for (; *one; ++one)
    if (name == (*one)->name) return **one;
  throw nb::value_error("this CPU has no such kernels");
}

template <class T>
struct Result {
  nb::ndarray<nb::numpy, int64_t, nb::ndim<2>> ids;
  nb::ndarray<nb::numpy, T, nb::ndim<2>> scores;
};

template <class T>
auto make(size_t rows, size_t columns) {
  require(columns <= (size_t{1} << 40) / (rows ? rows : 1), "more results than memory could hold");
  auto* memory = new T[rows * columns];
  nb::capsule owner(memory, [](void* p) noexcept { delete[] static_cast<T*>(p); });
  return nb::ndarray<nb::numpy, T, nb::ndim<2>>(memory, {rows, columns}, owner);
}

const uint64_t* checked(const Deleted& deleted, size_t rows) {
  if (!deleted) return nullptr;
  require(deleted->size() >= (rows + 63) / 64, "deleted has fewer bits than there are rows");
  return deleted->data();
}

template <class T, class Search>
nb::tuple searched(size_t queries, size_t k, Search search) {
  auto ids = make<int64_t>(queries, k);
  auto scores = make<T>(queries, k);
  {
    nb::gil_scoped_release release;
    search(ids.data(), scores.data());
  }
  return nb::make_tuple(ids, scores);
}

Rows packed_rows(const Vector<uint8_t>& packed, size_t count, size_t dim, const Deleted& deleted) {
  require(dim >= kChunk && dim % kChunk == 0, "codes have a multiple of 4 dimensions");
  require(count <= std::numeric_limits<uint32_t>::max(), "more rows than an index can number");
  require(packed.size() >= (count + kBlock - 1) / kBlock * kBlock * dim,
          "the packed codes have fewer rows");
  return {packed.data(), nullptr, count, dim / kChunk, checked(deleted, count)};
}

}  // namespace
}  // namespace matryoshka::search

NB_MODULE(_native, m) {
  using namespace matryoshka;
  using namespace matryoshka::search;
  m.attr("BLOCK") = kBlock;
  m.attr("CHUNK") = kChunk;

  nb::class_<Pool>(m, "Pool")
      .def(nb::init<int>(), "num_threads"_a)
      .def_prop_ro("num_threads", &Pool::num_threads);

  m.def("kernels", [] {
    std::vector<std::string> names;
    for (const Kernels* const* one = available(); *one; ++one) names.emplace_back((*one)->name);
    return names;
  });

  m.def(
      "pack",
      [](Pool& pool, const Matrix<uint8_t>& codes,
         nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> packed) {
        const size_t rows = codes.shape(0), dim = codes.shape(1);
        require(dim >= kChunk && dim % kChunk == 0, "codes have a multiple of 4 dimensions");
        require(packed.size() >= (rows + kBlock - 1) / kBlock * kBlock * dim,
                "packed is too small");
        nb::gil_scoped_release release;
        pack(pool, codes.data(), rows, dim / kChunk, packed.data());
      },
      "pool"_a, "codes"_a, "packed"_a);

  m.def(
      "search_codes",
      [](Pool& pool, const Vector<uint8_t>& packed, size_t count, const Matrix<int8_t>& queries,
         size_t k, const Deleted& deleted, const std::string& kernels) {
        const Rows rows = packed_rows(packed, count, queries.shape(1), deleted);
        const Kernels& chosen = kernels_named(kernels);
        return searched<int32_t>(queries.shape(0), k, [&](int64_t* ids, int32_t* scores) {
          search_all(pool, chosen, rows, reinterpret_cast<const uint8_t*>(queries.data()),
                     queries.shape(0), k, ids, scores);
        });
      },
      "pool"_a, "packed"_a, "count"_a, "queries"_a, "k"_a, "deleted"_a = nb::none(),
      "kernels"_a = "");

  m.def(
      "pack_bits",
      [](const Matrix<uint64_t>& bits,
         nb::ndarray<uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu> packed) {
        const size_t rows = bits.shape(0), words = bits.shape(1);
        require(words >= 1, "bits have at least one word");
        require(packed.size() >= (rows + kBlock - 1) / kBlock * kBlock * words,
                "packed is too small");
        nb::gil_scoped_release release;
        pack_bits(bits.data(), rows, words, packed.data());
      },
      "bits"_a, "packed"_a);

  m.def(
      "search_bits",
      [](Pool& pool, const Vector<uint64_t>& packed, size_t count, const Matrix<uint64_t>& queries,
         size_t k, const Deleted& deleted, const std::string& kernels) {
        const size_t words = queries.shape(1);
        require(words >= 1, "bits have at least one word");
        require(count <= std::numeric_limits<uint32_t>::max(),
                "more rows than an index can number");
        require(packed.size() >= (count + kBlock - 1) / kBlock * kBlock * words,
                "the packed bits have fewer rows");
        const Rows rows{nullptr, packed.data(), count, words, checked(deleted, count)};
        const Kernels& chosen = kernels_named(kernels);
        return searched<int32_t>(queries.shape(0), k, [&](int64_t* ids, int32_t* scores) {
          search_all(pool, chosen, rows, reinterpret_cast<const uint8_t*>(queries.data()),
                     queries.shape(0), k, ids, scores);
        });
      },
      "pool"_a, "packed"_a, "count"_a, "queries"_a, "k"_a, "deleted"_a = nb::none(),
      "kernels"_a = "");

  m.def(
      "search_lists",
      [](Pool& pool, const Vector<uint8_t>& packed, const Vector<int64_t>& starts,
         const Vector<int32_t>& sizes, const Vector<uint32_t>& ids_of_slots, size_t num_ids,
         const Matrix<int8_t>& queries, const Matrix<int32_t>& probes, size_t k,
         const Deleted& deleted, const std::string& kernels) {
        const size_t slots = ids_of_slots.size();
        Rows rows = packed_rows(packed, slots, queries.shape(1), std::nullopt);
        rows.deleted = checked(deleted, num_ids);
        require(starts.size() == sizes.size(), "starts and sizes have different lengths");
        require(probes.shape(0) == queries.shape(0), "probes and queries have different lengths");
        for (size_t i = 0; i < starts.size(); ++i) {
          const int64_t start = starts(i), size = sizes(i);
          require(start >= 0 && size >= 0 && start % static_cast<int64_t>(kBlock) == 0 &&
                      size <= static_cast<int64_t>(slots) &&
                      start <= static_cast<int64_t>(slots) - size,
                  "a list lies outside of the packed codes");
        }
        const Lists lists{starts.data(), sizes.data(), ids_of_slots.data(), starts.size(), num_ids};
        const Kernels& chosen = kernels_named(kernels);
        return searched<int32_t>(queries.shape(0), k, [&](int64_t* ids, int32_t* scores) {
          search_lists(pool, chosen, rows, lists, reinterpret_cast<const uint8_t*>(queries.data()),
                       queries.shape(0), probes.data(), probes.shape(1), k, ids, scores);
        });
      },
      "pool"_a, "packed"_a, "starts"_a, "sizes"_a, "ids"_a, "num_ids"_a, "queries"_a, "probes"_a,
      "k"_a, "deleted"_a = nb::none(), "kernels"_a = "");

  m.def(
      "rerank",
      [](Pool& pool, const std::vector<std::tuple<Table, size_t, size_t, size_t>>& stages,
         const Matrix<float>& queries, const Matrix<int64_t>& candidates,
         const std::string& kernels) {
        require(!stages.empty(), "no stage to re-rank with");
        require(candidates.shape(0) == queries.shape(0),
                "candidates and queries have different lengths");
        std::vector<Stage> checked_stages;
        size_t end_before = 0, num_rows = 0;
        for (const auto& [table, begin, end, keep] : stages) {
          const auto type = table.dtype();
          require(type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) &&
                      (type.bits == 16 || type.bits == 32),
                  "rows are neither float16 nor float32");
          require(table.stride(1) == 1 || table.shape(1) == 1,
                  "the numbers of a row do not lie side by side");
          require(table.stride(0) >= 0, "rows lie backwards");
          require(begin == end_before && begin < end && end <= table.shape(1) &&
                      end <= queries.shape(1),
                  "stages do not follow each other inside of rows and queries");
          require(keep >= 1, "a stage keeps no candidate");
          require(!num_rows || num_rows == table.shape(0), "stages have different numbers of rows");
          num_rows = table.shape(0);
          end_before = end;
          checked_stages.push_back({table.data(), type.bits == 16,
                                    static_cast<size_t>(table.stride(0)), begin, end, keep});
        }
        const Kernels& chosen = kernels_named(kernels);
        return searched<float>(
            queries.shape(0), checked_stages.back().keep, [&](int64_t* ids, float* scores) {
              rerank(pool, chosen, checked_stages, num_rows, queries.data(), queries.shape(1),
                     queries.shape(0), candidates.data(), candidates.shape(1), ids, scores);
            });
      },
      "pool"_a, "stages"_a, "queries"_a, "candidates"_a, "kernels"_a = "");
}
