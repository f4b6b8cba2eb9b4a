// Checksums of the blocks of a file, compared when a block is first read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "../../data/native/pool.hpp"

namespace matryoshka {

// 64 bits of XXH64 (github.com/Cyan4973/xxHash, doc/xxhash_spec.md) with seed 0.
uint64_t xxh64(const uint8_t* data, size_t size);

// Thrown for a block whose checksum differs.
struct DamagedBlock : std::runtime_error {
  DamagedBlock() : std::runtime_error("a block differs from its checksum") {}
};

// The blocks of one file. state: of each block, kUnread, kSound or kDamaged; shared by all threads,
// two of which may check the same block.
struct BlockSums {
  static constexpr uint8_t kUnread = 0, kSound = 1, kDamaged = 2;

  const uint8_t* data;
  size_t size;
  size_t block;  // bytes
  const uint64_t* sums;
  uint8_t* state;

  size_t count() const { return (size + block - 1) / block; }

  // Check the blocks of the bytes begin .. end. Throws DamagedBlock.
  void check(size_t begin, size_t end) const {
    if (begin >= end) return;
    const size_t last = (end - 1) / block;
    for (size_t b = begin / block; b <= last; ++b) {
      if (__atomic_load_n(&state[b], __ATOMIC_ACQUIRE) != kSound) check_block(b);
    }
  }
  // As `check` for all blocks, on all threads of a pool.
  void check_all(Pool& pool) const;

 private:
  void check_block(size_t number) const;
};

// The checksum of each block of `size` bytes.
void sum_blocks(Pool& pool, const uint8_t* data, size_t size, size_t block, uint64_t* sums);

}  // namespace matryoshka
