// Read-only maps of files that may be cut off meanwhile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace matryoshka {

// A whole file, mapped. Reading beyond the end of a file that was cut off, or a page that the disk
// cannot read, raises SIGBUS, which ends the process. Inside these maps the signal is caught: the
// rest of the map becomes zeros, and `is_cut` tells it. Whoever reads asks for it afterwards.
class GuardedMap {
 public:
  // Throws std::system_error for a file that cannot be opened or mapped, or is not a regular one,
  // and std::length_error for another size.
  GuardedMap(const std::string& path, size_t size);
  ~GuardedMap();
  GuardedMap(const GuardedMap&) = delete;
  GuardedMap& operator=(const GuardedMap&) = delete;

  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  // Whether some of the file could not be read, or is not there any more.
  bool is_cut() const;

  // Catch the signal again, if other code has taken it since, as torch does in its workers.
  static void keep_guard();

 private:
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
  int region_ = -1;
  int file_ = -1;  // kept open for is_cut
};

}  // namespace matryoshka
