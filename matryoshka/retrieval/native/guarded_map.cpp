#include "guarded_map.hpp"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <mutex>
#include <stdexcept>
#include <system_error>

namespace matryoshka {
namespace {

// What the signal handler reads, which may not lock: a slot is free while `begin` is 0.
struct Region {
  std::atomic<uintptr_t> begin{0};
  std::atomic<size_t> size{0};
  std::atomic<bool> cut{false};
};
constexpr int kMaxRegions = 16384;  // an index has up to 128 parts of 9 large files
Region regions[kMaxRegions];
std::atomic<int> used_regions{0};  // slots from here on were never used
std::mutex setup;                  // of slots and of the handler
struct sigaction previous;
std::atomic<bool> chaining{false};
size_t page_size = 4096;

Region* region_of(uintptr_t address) {
  const int end = used_regions.load(std::memory_order_acquire);
  for (int i = 0; i < end; ++i) {
    const uintptr_t begin = regions[i].begin.load(std::memory_order_acquire);
    if (begin && address >= begin && address - begin < regions[i].size.load()) return &regions[i];
  }
  return nullptr;
}

// Zeros in place of the page and all after it. True if the reader may continue.
bool replace_rest(Region& region, uintptr_t address) {
  const uintptr_t page = address & ~static_cast<uintptr_t>(page_size - 1);
  const uintptr_t end = region.begin.load() + region.size.load();
  // Before the zeros: who has read one of them must see it.
  region.cut.store(true);
  void* const place = reinterpret_cast<void*>(page);  // NOLINT(performance-no-int-to-ptr)
  return mmap(place, end - page, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) !=
         MAP_FAILED;
}

// Only async-signal-safe calls.
void on_bus_error(int number, siginfo_t* info, void* context) {
  const int error = errno;
  const bool is_fault = info->si_code > 0;  // not sent by a process
  if (is_fault) {
    const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
    Region* const region = region_of(address);
    if (region && replace_rest(*region, address)) {
      errno = error;
      return;
    }
  }
  // Another's business. A handler that calls ours in turn ends in the default.
  if (!chaining.exchange(true)) {
    if (previous.sa_flags & SA_SIGINFO) {
      previous.sa_sigaction(number, info, context);
      chaining.store(false);
      errno = error;
      return;
    }
    if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
      previous.sa_handler(number);
      chaining.store(false);
      errno = error;
      return;
    }
  }
  signal(number, SIG_DFL);
  // A fault comes again when the handler returns; a signal that was sent does not.
  if (!is_fault) raise(number);
  errno = error;
}

bool is_guarded() {
  struct sigaction now{};
  sigaction(SIGBUS, nullptr, &now);
  return (now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_bus_error;
}

void install_guard() {
  struct sigaction own{};
  own.sa_sigaction = on_bus_error;
  own.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigemptyset(&own.sa_mask);
  page_size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  sigaction(SIGBUS, &own, &previous);
}

int add_region(const void* data, size_t size) {
  const std::lock_guard<std::mutex> lock(setup);
  for (int i = 0; i < kMaxRegions; ++i) {
    if (regions[i].begin.load()) continue;
    regions[i].size.store(size);
    regions[i].cut.store(false);
    regions[i].begin.store(reinterpret_cast<uintptr_t>(data), std::memory_order_release);
    if (i >= used_regions.load()) used_regions.store(i + 1, std::memory_order_release);
    return i;
  }
  return -1;
}

}  // namespace

GuardedMap::GuardedMap(const std::string& path, size_t size) : size_(size) {
  // O_NONBLOCK: opening a pipe would wait for its other end.
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) throw std::system_error(errno, std::generic_category());
  struct stat status{};
  const bool is_known = fstat(file, &status) == 0;
  const bool fits = is_known && S_ISREG(status.st_mode) && status.st_size >= 0 &&
                    static_cast<uint64_t>(status.st_size) == size;
  if (!fits) {
    close(file);
    throw std::length_error("is not a regular file of the expected size");
  }
  void* const data = size ? mmap(nullptr, size, PROT_READ, MAP_SHARED, file, 0) : nullptr;
  const int error = errno;
  if (!size || data == MAP_FAILED) {
    close(file);
    if (size) throw std::system_error(error, std::generic_category());
    return;
  }
  keep_guard();
  region_ = add_region(data, size);
  if (region_ < 0) {
    munmap(data, size);
    close(file);
    throw std::system_error(ENFILE, std::generic_category());
  }
  data_ = static_cast<const uint8_t*>(data);
  file_ = file;
}

GuardedMap::~GuardedMap() {
  if (region_ < 0) return;
  // The slot goes after the map: a signal in between would find nobody.
  munmap(const_cast<uint8_t*>(data_), size_);
  close(file_);
  const std::lock_guard<std::mutex> lock(setup);
  regions[region_].begin.store(0, std::memory_order_release);
}

bool GuardedMap::is_cut() const {
  if (region_ < 0) return false;
  if (regions[region_].cut.load()) return true;
  // The page with the new end of a file has zeros behind it, which raise no signal.
  struct stat status{};
  return fstat(file_, &status) != 0 || static_cast<uint64_t>(status.st_size) < size_;
}

void GuardedMap::keep_guard() {
  if (is_guarded()) return;
  const std::lock_guard<std::mutex> lock(setup);
  if (!is_guarded()) install_guard();
}

}  // namespace matryoshka
