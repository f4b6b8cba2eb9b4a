// A file's bytes, mapped into memory. Reading a page that a file has lost, because it was cut off
// or because its disk fails, raises SIGBUS, which ends a process. In these maps the reader finds
// zeros instead, and the map is torn. A reader asks that after its last read.
#pragma once

#include <cstddef>
#include <cstdint>

#include "bytes.hpp"

namespace matryoshka {

// Make sure that our handler of SIGBUS is the one that is installed: PyTorch's worker processes and
// Python's faulthandler install others. Costs a system call; call it before a batch of reads.
void guard_maps();

class FileMap {
 public:
  // The whole of an open file, at least one byte. std::system_error if it cannot be mapped.
  explicit FileMap(int descriptor);
  ~FileMap();
  FileMap(const FileMap&) = delete;
  FileMap& operator=(const FileMap&) = delete;

  Bytes bytes() const { return {data_, size_}; }
  // Whether a page was missing at any time since this map exists. The page that holds the file's
  // new end has zeros behind it, too, without a fault: compare file_size as well.
  bool torn() const;
  // The file's size now.
  int64_t file_size() const;

  // Hints for the system's cache: read the file soon; forget a part of it.
  void expect() const;
  void forget(size_t offset, size_t size) const;

  struct Region;

 private:
  int descriptor_;
  const uint8_t* data_;
  size_t size_;
  Region* region_;
};

}  // namespace matryoshka
