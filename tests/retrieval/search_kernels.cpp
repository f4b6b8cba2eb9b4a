// Compares every search kernel that this CPU can run with plain loops. test_cross.py compiles it
// for other CPUs and runs it in an emulator. Prints a line for each kernel; exits with 1 at the
// first difference.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <set>
#include <vector>

#include "scan_kernels.hpp"

using namespace matryoshka::search;

namespace {

std::mt19937 rng(7);

int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(rng); }

using Keys = std::set<uint64_t>;

// The keys that a scan of the rows first .. end finds for each query above its threshold. The small
// buffers force it to stop and resume.
template <class Scan>
std::vector<Keys> scan_all(Scan scan, size_t first, size_t end,
                           const std::vector<int32_t>& thresholds) {
  const size_t count = thresholds.size();
  std::vector<Keys> all(count);
  std::vector<std::vector<uint64_t>> keys(count);
  for (auto& buffer : keys) buffer.resize(kBlock + static_cast<size_t>(draw(0, 100)));
  while (first < end) {
    std::vector<HitBuffer> hits;
    HitBuffer* pointers[kQueriesPerScan];
    for (size_t q = 0; q < count; ++q)
      hits.push_back({thresholds[q], keys[q].data(), 0, keys[q].size()});
    for (size_t q = 0; q < count; ++q) pointers[q] = &hits[q];
    const size_t stopped = scan(first, end, count, pointers);
    if (stopped <= first) return {};
    for (size_t q = 0; q < count; ++q) {
      if (hits[q].count + hits[q].room != keys[q].size()) return {};
      all[q].insert(keys[q].begin(), keys[q].begin() + static_cast<long>(hits[q].count));
    }
    first = stopped;
  }
  return all;
}

bool codes_agree(const Kernels& kernels) {
  const size_t chunks = static_cast<size_t>(draw(0, 3) ? draw(1, 40) : 1 << draw(1, 4));
  const size_t width = 4 * chunks;
  const size_t rows = static_cast<size_t>(draw(1, 400));
  const size_t count = static_cast<size_t>(draw(1, 4));
  const size_t room = (rows + kBlock - 1) / kBlock * kBlock;
  const int highest = draw(0, 1) ? 127 : 1;
  std::vector<uint8_t> codes(room * width), packed(room * width);
  std::vector<int8_t> queries(count * width);
  for (auto& code : codes) code = static_cast<uint8_t>(draw(0, highest));
  for (auto& q : queries)
    q = static_cast<int8_t>(draw(0, 3) ? draw(-127, 127) : draw(0, 1) * 254 - 127);
  for (size_t row = 0; row < room; ++row)
    for (size_t d = 0; d < width; ++d)
      packed[row / 16 * 16 * width + d / 4 * 64 + row % 16 * 4 + d % 4] = codes[row * width + d];
  const size_t first = static_cast<size_t>(draw(0, static_cast<int>(rows / kBlock))) * kBlock;
  std::vector<int32_t> thresholds;
  std::vector<Keys> expected(count);
  const int8_t* pointers[kQueriesPerScan];
  for (size_t q = 0; q < count; ++q) {
    pointers[q] = queries.data() + q * width;
    thresholds.push_back(draw(0, 3) ? draw(-20000, 20000) : INT32_MIN);
    for (size_t row = first; row < rows; ++row) {
      int32_t score = 0;
      for (size_t d = 0; d < width; ++d) score += codes[row * width + d] * pointers[q][d];
      if (score > thresholds[q]) expected[q].insert(make_key(score, static_cast<uint32_t>(row)));
    }
  }
  const auto scan = [&](size_t a, size_t b, size_t n, HitBuffer* const* hits) {
    return kernels.scan_codes(packed.data(), a, b, chunks, pointers, n, hits);
  };
  return expected == scan_all(scan, first, rows, thresholds);
}

bool bits_agree(const Kernels& kernels) {
  const size_t words = static_cast<size_t>(draw(1, draw(0, 4) ? 9 : 70));
  const size_t rows = static_cast<size_t>(draw(1, 300));
  const size_t room = (rows + kBlock - 1) / kBlock * kBlock;
  const size_t count = static_cast<size_t>(draw(1, 4));
  std::vector<uint64_t> bits(room * words), packed(room * words), queries(count * words);
  const bool extreme = !draw(0, 3);  // all bits differ: the highest counts
  for (auto& word : bits) word = extreme ? ~0ull : static_cast<uint64_t>(rng()) << 32 | rng();
  for (auto& word : queries) word = extreme ? 0 : static_cast<uint64_t>(rng()) << 32 | rng();
  for (size_t row = 0; row < room; ++row)
    for (size_t w = 0; w < words; ++w)
      packed[row / 8 * 8 * words + w * 8 + row % 8] = bits[row * words + w];
  const int middle = static_cast<int>(32 * words);
  std::vector<int32_t> thresholds;
  std::vector<Keys> expected(count);
  const uint64_t* pointers[kQueriesPerScan];
  for (size_t q = 0; q < count; ++q) {
    pointers[q] = queries.data() + q * words;
    thresholds.push_back(draw(0, 3) ? -draw(middle - 20, middle + 20) : INT32_MIN);
    for (size_t row = 0; row < rows; ++row) {
      int32_t score = 0;
      for (size_t w = 0; w < words; ++w)
        for (int bit = 0; bit < 64; ++bit)
          score -= (bits[row * words + w] ^ pointers[q][w]) >> bit & 1;
      if (score > thresholds[q]) expected[q].insert(make_key(score, static_cast<uint32_t>(row)));
    }
  }
  const auto scan = [&](size_t a, size_t b, size_t n, HitBuffer* const* hits) {
    return kernels.scan_bits(packed.data(), a, b, words, pointers, n, hits);
  };
  return expected == scan_all(scan, 0, rows, thresholds);
}

// A half-precision number made from any integer, and its exact value: zero, a subnormal number, or
// +-(1024 .. 2047) x 2^-24 .. 2^-10.
uint16_t as_half(int number, float* value) {
  if (number % 7 == 0) {
    *value = 0;
    return 0;
  }
  const bool subnormal = number % 5 == 0;
  const int exponent = subnormal ? 0 : 1 + std::abs(number) % 15;
  const int mantissa = std::abs(number) % 1024;
  const int significand = subnormal ? mantissa : 1024 + mantissa;
  *value = std::ldexp(static_cast<float>(significand), (subnormal ? 1 : exponent) - 25);
  if (number < 0) *value = -*value;
  return static_cast<uint16_t>((number < 0 ? 0x8000 : 0) | exponent << 10 | mantissa);
}

bool dots_agree(const Kernels& kernels) {
  const size_t n = static_cast<size_t>(draw(1, 70));
  std::vector<uint16_t> halves[kRowsPerDot];
  std::vector<float> singles[kRowsPerDot], query(n);
  const uint16_t* half_rows[kRowsPerDot];
  const float* single_rows[kRowsPerDot];
  for (auto& q : query) q = static_cast<float>(draw(-1000, 1000)) / 997;
  for (size_t r = 0; r < kRowsPerDot; ++r) {
    halves[r].resize(n);
    singles[r].resize(n);
    for (size_t i = 0; i < n; ++i) halves[r][i] = as_half(draw(-30000, 30000), &singles[r][i]);
    half_rows[r] = halves[r].data();
    single_rows[r] = singles[r].data();
  }
  for (const bool half : {true, false}) {
    float dots[kRowsPerDot] = {1, 2, 3, 4};  // the kernels add to what is there
    float squares[kRowsPerDot] = {5, 6, 7, 8};
    if (half)
      kernels.dot_half(half_rows, query.data(), n, dots, squares);
    else
      kernels.dot_single(single_rows, query.data(), n, dots, squares);
    for (size_t r = 0; r < kRowsPerDot; ++r) {
      double dot = 1 + static_cast<double>(r);
      double square = 5 + static_cast<double>(r);
      double size = 1;  // rounding errors grow with it
      for (size_t i = 0; i < n; ++i) {
        const double x = singles[r][i];
        dot += x * query[i];
        square += x * x;
        size += std::fabs(x * query[i]) + x * x;
      }
      const bool dot_agrees = std::fabs(dots[r] - dot) < 1e-5 * size;
      const bool square_agrees = std::fabs(squares[r] - square) < 1e-5 * size;
      if (!dot_agrees || !square_agrees) return false;
    }
  }
  return true;
}

// The first kind of kernel that differs from the plain loops, or null.
const char* find_difference(const Kernels& kernels) {
  if (!codes_agree(kernels)) return "codes";
  if (!bits_agree(kernels)) return "bits";
  if (!dots_agree(kernels)) return "products";
  return nullptr;
}

}  // namespace

int main() {
  for (const Kernels* const* list = available_kernels(); *list; ++list) {
    const Kernels& kernels = **list;
    for (int i = 0; i < 400; ++i) {
      if (const char* kind = find_difference(kernels)) {
        std::printf("%s: %s differ in case %d\n", kernels.name, kind, i);
        return 1;
      }
    }
    std::printf("%s agrees\n", kernels.name);
  }
}
