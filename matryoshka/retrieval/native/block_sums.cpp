#include "block_sums.hpp"

#include <algorithm>
#include <cstring>

namespace matryoshka {
namespace {

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87;
constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4F;
constexpr uint64_t kPrime3 = 0x165667B19E3779F9;
constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63;
constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5;
constexpr size_t kBlocksPerTask = 32;  // a task of 1 MB

inline uint64_t rotate(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }

// Little-endian, as the machines are that this library supports.
template <class T>
inline T load(const uint8_t* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline uint64_t add_lane(uint64_t lane, uint64_t input) {
  return rotate(lane + input * kPrime2, 31) * kPrime1;
}

inline uint64_t merge_lane(uint64_t hash, uint64_t lane) {
  return (hash ^ add_lane(0, lane)) * kPrime1 + kPrime4;
}

}  // namespace

uint64_t xxh64(const uint8_t* data, size_t size) {
  const uint8_t* at = data;
  const uint8_t* const end = data + size;
  uint64_t hash = kPrime5;
  if (size >= 32) {
    uint64_t lanes[4] = {kPrime1 + kPrime2, kPrime2, 0, 0 - kPrime1};
    for (; end - at >= 32; at += 32) {
      for (int i = 0; i < 4; ++i) lanes[i] = add_lane(lanes[i], load<uint64_t>(at + 8 * i));
    }
    hash = rotate(lanes[0], 1) + rotate(lanes[1], 7) + rotate(lanes[2], 12) + rotate(lanes[3], 18);
    for (const uint64_t lane : lanes) hash = merge_lane(hash, lane);
  }
  hash += size;
  for (; end - at >= 8; at += 8) {
    hash = rotate(hash ^ add_lane(0, load<uint64_t>(at)), 27) * kPrime1 + kPrime4;
  }
  if (end - at >= 4) {
    hash = rotate(hash ^ load<uint32_t>(at) * kPrime1, 23) * kPrime2 + kPrime3;
    at += 4;
  }
  for (; at < end; ++at) hash = rotate(hash ^ *at * kPrime5, 11) * kPrime1;
  hash = (hash ^ (hash >> 33)) * kPrime2;
  hash = (hash ^ (hash >> 29)) * kPrime3;
  return hash ^ (hash >> 32);
}

void BlockSums::check_block(size_t number) const {
  const size_t first = number * block;
  const bool is_sound = xxh64(data + first, std::min(block, size - first)) == sums[number];
  __atomic_store_n(&state[number], is_sound ? kSound : kDamaged, __ATOMIC_RELEASE);
  if (!is_sound) throw DamagedBlock();
}

void BlockSums::check_all(Pool& pool) const {
  const size_t blocks = count();
  pool.run((blocks + kBlocksPerTask - 1) / kBlocksPerTask, [&](size_t task, int) {
    const size_t first = task * kBlocksPerTask;
    check(first * block, std::min(size, (first + kBlocksPerTask) * block));
  });
}

void sum_blocks(Pool& pool, const uint8_t* data, size_t size, size_t block, uint64_t* sums) {
  const size_t blocks = (size + block - 1) / block;
  pool.run((blocks + kBlocksPerTask - 1) / kBlocksPerTask, [&](size_t task, int) {
    const size_t last = std::min(blocks, (task + 1) * kBlocksPerTask);
    for (size_t b = task * kBlocksPerTask; b < last; ++b) {
      sums[b] = xxh64(data + b * block, std::min(block, size - b * block));
    }
  });
}

}  // namespace matryoshka
