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
const uintptr_t page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
struct sigaction previous = {};    // what to do about faults outside our maps
std::atomic<uintptr_t> asking{0};  // the thread that has handed a fault on

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
    const uintptr_t begin = r->begin.load();
    const uintptr_t end = r->end.load();
    // Equal a second time: the end is of this map, not of one that came after it.
    if (begin <= address && address < end && begin == r->begin.load()) return r;
  }
  return nullptr;
}

// Replace the missing page, and all behind it, by zeros. As in libwayland's wayland-shm.c: mmap is
// a plain system call, and the access that failed is repeated after the return.
bool replace_rest(Region& region, uintptr_t address) {
  const uintptr_t page = address & ~(page_size - 1);
  region.torn.store(true);  // before the zeros: who has read one must see it
  void* const place = reinterpret_cast<void*>(page);  // NOLINT(performance-no-int-to-ptr)
  const size_t size = region.end.load() - page;
  return mmap(place, size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED;
}

// What the process does without us. A fault comes again when the handler returns; a signal that
// was sent does not.
void act_by_default(int number, bool is_fault) {
  struct sigaction action = {};
  action.sa_handler = SIG_DFL;
  sigaction(number, &action, nullptr);
  if (!is_fault) raise(number);
}

void hand_on(int number, siginfo_t* info, void* context) {
  const bool is_fault = info->si_code > 0;  // else sent by kill
  const bool takes_info = previous.sa_flags & SA_SIGINFO;
  if (!takes_info && previous.sa_handler == SIG_IGN && !is_fault) return;
  const bool has_handler =
      takes_info || (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN);
  // Two libraries may each have the other's handler as the one before: it ends at the second time.
  const uintptr_t thread = reinterpret_cast<uintptr_t>(&errno);  // one address in each thread
  if (!has_handler || asking.exchange(thread) == thread) return act_by_default(number, is_fault);
  if (takes_info) {
    previous.sa_sigaction(number, info, context);
  } else {
    previous.sa_handler(number);
  }
  asking.store(0);
}

// Only calls that are safe in a signal handler.
void on_bus_error(int number, siginfo_t* info, void* context) {
  const int saved_errno = errno;
  const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
  Region* const region = info->si_code > 0 ? region_of(address) : nullptr;
  if (!region || !replace_rest(*region, address)) hand_on(number, info, context);
  errno = saved_errno;
}

bool is_ours(const struct sigaction& action) {
  return (action.sa_flags & SA_SIGINFO) && action.sa_sigaction == on_bus_error;
}

}  // namespace

void guard_maps() {
  struct sigaction current;
  if (!all_regions.load() || sigaction(SIGBUS, nullptr, &current) != 0 || is_ours(current)) return;
  struct sigaction ours = {};
  ours.sa_sigaction = on_bus_error;
  // NODEFER: the handler that was there before may put itself back and raise the signal again.
  ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigemptyset(&ours.sa_mask);
  // Of several threads that come here at once, one gets the other handler; the rest get ours.
  if (sigaction(SIGBUS, &ours, &current) == 0 && !is_ours(current)) previous = current;
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
