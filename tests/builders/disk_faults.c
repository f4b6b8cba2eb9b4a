/* A library to preload (LD_PRELOAD) that counts the calls which change files below a folder, and
   makes one of them, or all from there on, fail, or sends the process a signal before it.

   Calls inside libc (stdio) are not seen: the programs write through Python. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

/* COUNT: nothing. SIGNAL: before the call. TORN: a write is cut in half, then the signal.
   FULL: from this call on, nothing that needs space succeeds. READ_ONLY: nothing at all does.
   FAILED: this call alone fails. */
enum action { COUNT, SIGNAL, TORN, FULL, READ_ONLY, FAILED };

static char folder[PATH_MAX];
static atomic_long calls;
static long first;
static enum action action;
static int number; /* of the signal or the error */
static int trace = -1;
static atomic_int halved;

/* The faults of this process, from now on. trace_file: descriptor to which the calls are written,
   one a line; -1: none. */
void faults_arm(const char *below, long at, int what, int value, int trace_file) {
  snprintf(folder, sizeof folder, "%s", below);
  first = at;
  action = what;
  number = value;
  trace = trace_file;
  calls = 0;
  halved = 0;
}

long faults_calls(void) { return calls; }

static int is_below(const char *path) {
  size_t length = strlen(folder);
  return length && strncmp(path, folder, length) == 0 && (path[length] == '/' || !path[length]);
}

static void name_of(int descriptor, char *out) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, out, PATH_MAX - 1);
  out[length > 0 ? length : 0] = 0;
}

static void absolute(int at, const char *path, char *out) {
  if (path[0] == '/') {
    snprintf(out, PATH_MAX, "%s", path);
    return;
  }
  char base[PATH_MAX];
  if (at == AT_FDCWD) {
    if (!getcwd(base, sizeof base)) base[0] = 0;
  } else {
    name_of(at, base);
  }
  size_t length = strlen(base);
  snprintf(out, PATH_MAX, "%s", base);
  snprintf(out + length, PATH_MAX - length, "/%s", path);
}

/* The error of a call, 0: let it pass. room: of what a write asks for; reduced for a short one. */
static int fate(const char *call, const char *path, int needs_space, size_t *room) {
  if (!is_below(path)) return 0;
  long now = atomic_fetch_add(&calls, 1) + 1;
  if (trace >= 0) dprintf(trace, "%s %s\n", call, path + strlen(folder));
  if (now < first || action == COUNT) return 0;
  switch (action) {
    case SIGNAL:
      if (now == first) kill(getpid(), number);
      return 0;
    case TORN:
      if (now == first) {
        if (!room || *room < 2) kill(getpid(), number);
        else *room /= 2;
      } else {
        kill(getpid(), number);
      }
      return 0;
    case FULL:
      if (!needs_space) return 0;
      if (room && *room > 1 && !atomic_exchange(&halved, 1)) {
        *room /= 2; /* as a real disk: what still fits is written */
        return 0;
      }
      return number;
    case READ_ONLY:
      return number;
    case FAILED:
      return now == first ? number : 0;
    default:
      return 0;
  }
}

static int fate_at(const char *call, int at, const char *path, int needs_space) {
  char name[PATH_MAX];
  if (!folder[0] || !path) return 0;
  absolute(at, path, name);
  return fate(call, name, needs_space, NULL);
}

static int fate_of(const char *call, int descriptor, int needs_space, size_t *room) {
  char name[PATH_MAX];
  if (!folder[0]) return 0;
  name_of(descriptor, name);
  return fate(call, name, needs_space, room);
}

#define REFUSE(error)   \
  do {                  \
    int found = error;  \
    if (found) {        \
      errno = found;    \
      return -1;        \
    }                   \
  } while (0)

static int opened(int at, const char *path, int flags, mode_t mode) {
  if (flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR)) {
    int is_new = (flags & O_CREAT) && path && faccessat(at, path, F_OK, AT_SYMLINK_NOFOLLOW) != 0;
    REFUSE(fate_at("open", at, path, is_new));
  }
  return (int)syscall(SYS_openat, at, path, flags, mode);
}

#define MODE(flags)                                  \
  mode_t mode = 0;                                   \
  if ((flags) & O_CREAT || ((flags) & O_TMPFILE) == O_TMPFILE) { \
    va_list rest;                                    \
    va_start(rest, flags);                           \
    mode = va_arg(rest, mode_t);                     \
    va_end(rest);                                    \
  }

int open(const char *path, int flags, ...) {
  MODE(flags)
  return opened(AT_FDCWD, path, flags, mode);
}
int open64(const char *path, int flags, ...) {
  MODE(flags)
  return opened(AT_FDCWD, path, flags, mode);
}
int openat(int at, const char *path, int flags, ...) {
  MODE(flags)
  return opened(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
  MODE(flags)
  return opened(at, path, flags, mode);
}

ssize_t write(int descriptor, const void *data, size_t size) {
  REFUSE(fate_of("write", descriptor, 1, &size));
  return syscall(SYS_write, descriptor, data, size);
}
ssize_t writev(int descriptor, const struct iovec *parts, int count) {
  REFUSE(fate_of("writev", descriptor, 1, NULL));
  return syscall(SYS_writev, descriptor, parts, count);
}
ssize_t pwrite(int descriptor, const void *data, size_t size, off_t offset) {
  REFUSE(fate_of("pwrite", descriptor, 1, &size));
  return syscall(SYS_pwrite64, descriptor, data, size, offset);
}
ssize_t pwrite64(int descriptor, const void *data, size_t size, off_t offset) {
  return pwrite(descriptor, data, size, offset);
}
ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
  REFUSE(fate_of("sendfile", to, 1, &size));
  return syscall(SYS_sendfile, to, from, offset, size);
}
ssize_t sendfile64(int to, int from, off_t *offset, size_t size) {
  return sendfile(to, from, offset, size);
}
ssize_t copy_file_range(int from, off_t *a, int to, off_t *b, size_t size, unsigned flags) {
  REFUSE(fate_of("copy_file_range", to, 1, &size));
  return syscall(SYS_copy_file_range, from, a, to, b, size, flags);
}
int ftruncate(int descriptor, off_t size) {
  REFUSE(fate_of("ftruncate", descriptor, 0, NULL));
  return (int)syscall(SYS_ftruncate, descriptor, size);
}
int ftruncate64(int descriptor, off_t size) { return ftruncate(descriptor, size); }
int posix_fallocate(int descriptor, off_t offset, off_t size) {
  int found = fate_of("posix_fallocate", descriptor, 1, NULL);
  if (found) return found;
  return syscall(SYS_fallocate, descriptor, 0, offset, size) ? errno : 0;
}
int posix_fallocate64(int descriptor, off_t offset, off_t size) {
  return posix_fallocate(descriptor, offset, size);
}
int fsync(int descriptor) {
  REFUSE(fate_of("fsync", descriptor, 0, NULL));
  return (int)syscall(SYS_fsync, descriptor);
}
int fdatasync(int descriptor) {
  REFUSE(fate_of("fdatasync", descriptor, 0, NULL));
  return (int)syscall(SYS_fdatasync, descriptor);
}
int renameat(int from_at, const char *from, int to_at, const char *to) {
  REFUSE(fate_at("rename", to_at, to, 0));
  return (int)syscall(SYS_renameat2, from_at, from, to_at, to, 0);
}
int rename(const char *from, const char *to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }
int linkat(int from_at, const char *from, int to_at, const char *to, int flags) {
  REFUSE(fate_at("link", to_at, to, 1));
  return (int)syscall(SYS_linkat, from_at, from, to_at, to, flags);
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }
int symlink(const char *target, const char *path) {
  REFUSE(fate_at("symlink", AT_FDCWD, path, 1));
  return (int)syscall(SYS_symlinkat, target, AT_FDCWD, path);
}
int unlinkat(int at, const char *path, int flags) {
  REFUSE(fate_at(flags & AT_REMOVEDIR ? "rmdir" : "unlink", at, path, 0));
  return (int)syscall(SYS_unlinkat, at, path, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int mkdirat(int at, const char *path, mode_t mode) {
  REFUSE(fate_at("mkdir", at, path, 1));
  return (int)syscall(SYS_mkdirat, at, path, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
