#include "file_map.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <new>
#include <system_error>

namespace matryoshka {

// The handler may look at any time, in any thread: regions are never freed, only used again.
struct FileMap::Region {
  std::atomic<bool> taken{true};
  std::atomic<uintptr_t> begin{UINTPTR_MAX}, end{0};  // whole pages; no address: unused
  std::atomic<bool> torn{false};
  Region* next = nullptr;
};

namespace {

using Region = FileMap::Region;

std::atomic<Region*> all_regions{nullptr};
uintptr_t page_size = 0;
struct sigaction previous = {};  // what to do about faults outside our maps
std::atomic<uintptr_t> last_foreign{0};
std::atomic_flag installing = ATOMIC_FLAG_INIT;

Region* take_region() {
  for (Region* r = all_regions.load(); r; r = r->next) {
    bool free = false;
    if (r->taken.compare_exchange_strong(free, true)) return r;
  }
  Region* const region = new Region;
  region->next = all_regions.load();
  while (!all_regions.compare_exchange_weak(region->next, region)) {
  }
  return region;
}

Region* region_of(uintptr_t address) {
  for (Region* r = all_regions.load(); r; r = r->next) {
    if (r->begin.load() <= address && address < r->end.load()) return r;
  }
  return nullptr;
}

// Replace the missing page, and all behind it, by zeros. As in libwayland's wayland-shm.c: mmap is
// a plain system call, and the access that failed is repeated after the return.
void on_bus_error(int number, siginfo_t* info, void*) {
  const int saved_errno = errno;
  const bool fault = info->si_code > 0;  // else sent by kill
  const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
  Region* const region = fault ? region_of(address) : nullptr;
  if (region) {
    const uintptr_t page = address & ~(page_size - 1);
    region->torn.store(true);
    void* const zeros = mmap(reinterpret_cast<void*>(page), region->end.load() - page, PROT_READ,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    errno = saved_errno;
    if (zeros != MAP_FAILED) return;
  }
  // The access is repeated and reaches the handler that was there before ours. Two libraries that
  // each have the other as the one before would hand a fault to and fro: the second time is the
  // last.
  struct sigaction next = previous;
  if (fault && last_foreign.exchange(address) == address) {
    next = {};
    next.sa_handler = SIG_DFL;
  }
  sigaction(number, &next, nullptr);
  if (!fault) raise(number);
  errno = saved_errno;
}

}  // namespace

void guard_maps() {
  struct sigaction current;
  if (!all_regions.load() || sigaction(SIGBUS, nullptr, &current) != 0) return;
  if ((current.sa_flags & SA_SIGINFO) && current.sa_sigaction == on_bus_error) return;
  if (installing.test_and_set()) return;  // another thread does it
  previous = current;
  struct sigaction ours = {};
  ours.sa_sigaction = on_bus_error;
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&ours.sa_mask);
  sigaction(SIGBUS, &ours, nullptr);
  installing.clear();
}

FileMap::FileMap(int descriptor) {
  const auto fail = [] { throw std::system_error(errno, std::generic_category()); };
  struct stat status;
  if (fstat(descriptor, &status) != 0) fail();
  size_ = static_cast<size_t>(status.st_size);
  descriptor_ = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);  // the caller may close its own
  if (descriptor_ < 0) fail();
  void* const data = mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor_, 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    ::close(descriptor_);
    errno = error;
    fail();
  }
  data_ = static_cast<const uint8_t*>(data);
  page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  region_ = take_region();
  region_->torn.store(false);
  region_->end.store((begin + size_ + page_size - 1) / page_size * page_size);
  region_->begin.store(begin);
  guard_maps();
}

FileMap::~FileMap() {
  region_->begin.store(UINTPTR_MAX);
  region_->end.store(0);
  region_->taken.store(false);
  munmap(const_cast<uint8_t*>(data_), size_);
  ::close(descriptor_);
}

bool FileMap::torn() const { return region_->torn.load(); }

int64_t FileMap::file_size() const {
  struct stat status;
  return fstat(descriptor_, &status) == 0 ? static_cast<int64_t>(status.st_size) : 0;
}

void FileMap::expect() const { madvise(const_cast<uint8_t*>(data_), size_, MADV_WILLNEED); }

void FileMap::forget(size_t offset, size_t size) const {
  const size_t begin = offset / page_size * page_size;
  madvise(const_cast<uint8_t*>(data_) + begin, offset + size - begin, MADV_DONTNEED);
}

}  // namespace matryoshka
