// A view of bytes that someone else owns.
#pragma once

#include <cstddef>
#include <cstdint>

namespace matryoshka {

struct Bytes {
  const uint8_t* data;
  size_t size;
};

}  // namespace matryoshka
