// Counts the changes that a process makes below one folder, and does harm at the n-th.
//
//   cc -shared -fPIC -O1 -o faults.so faults.c -ldl;  LD_PRELOAD=./faults.so python ...
//
// A change is a file or folder that is made, written, cut, renamed, linked, removed or synced.
// Nothing happens before faults_arm is called.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT, KILL, TEAR, POWER, FAIL_ONCE, FAIL };  // the same numbers are in harness.py

static char folder[PATH_MAX];
static int mode, error_number, log_file = -1;
static long at, count;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

// Files that were written since their last fsync: a power failure loses what was written.
static struct { dev_t device; ino_t inode; int file; off_t safe; } dirty[4096];
static int dirty_files;

// below: an absolute path without links. The n-th change is harmed. log: every change, a line each.
void faults_arm(const char *below, int harm, long n, int number, const char *log) {
  snprintf(folder, sizeof folder, "%s", below);
  error_number = number;
  at = n;
  count = 0;
  if (log && *log) log_file = syscall(SYS_openat, AT_FDCWD, log, O_CREAT | O_WRONLY | O_APPEND, 0644);
  mode = harm;
}

static int is_below(const char *path) {
  size_t length = strlen(folder);
  return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static void of_file(int file, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  path[length > 0 ? length : 0] = 0;
}

static void of_name(int start, const char *name, char *path) {
  if (*name == '/') {
    snprintf(path, PATH_MAX, "%s", name);
    return;
  }
  if (start == AT_FDCWD) {
    if (!getcwd(path, PATH_MAX)) *path = 0;
  } else {
    of_file(start, path);
  }
  size_t length = strlen(path);
  snprintf(path + length, PATH_MAX - length, "/%s", name);
}

static void die(void) {
  syscall(SYS_kill, getpid(), SIGKILL);
  for (;;) pause();
}

static void lose_power(void) {
  for (int i = 0; i < dirty_files; i++) syscall(SYS_ftruncate, dirty[i].file, dirty[i].safe);
  die();
}

static int find_dirty(const struct stat *about) {
  for (int i = 0; i < dirty_files; i++)
    if (dirty[i].device == about->st_dev && dirty[i].inode == about->st_ino) return i;
  return -1;
}

static void note_write(int file) {
  struct stat about;
  if (fstat(file, &about) || !S_ISREG(about.st_mode)) return;
  if (find_dirty(&about) >= 0 || dirty_files == 4096) return;
  int copy = fcntl(file, F_DUPFD_CLOEXEC, 1000);
  if (copy < 0) return;
  dirty[dirty_files].device = about.st_dev;
  dirty[dirty_files].inode = about.st_ino;
  dirty[dirty_files].file = copy;
  dirty[dirty_files++].safe = about.st_size;
}

static void note_sync(int file) {
  struct stat about;
  if (fstat(file, &about)) return;
  int i = find_dirty(&about);
  if (i < 0) return;
  syscall(SYS_close, dirty[i].file);
  dirty[i] = dirty[--dirty_files];
}

enum { DONE, REFUSED, HALF };
enum { MAKES = 1, WRITES = 2, SYNCS = 4 };  // what a change does; 0: it only frees or renames

// What is to become of a change; REFUSED sets errno, and HALF means: write half, then die().
static int change(const char *what, const char *path, int kind, int file) {
  if (!is_below(path)) return DONE;
  int result = DONE;
  pthread_mutex_lock(&mutex);
  long n = ++count;
  if (log_file >= 0) {
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%ld %s %s\n", n, what, path + strlen(folder));
    syscall(SYS_write, log_file, line, length);
  }
  if (n >= at && mode == KILL) die();
  if (n >= at && mode == POWER) lose_power();
  if (n >= at && mode == TEAR && (kind & WRITES)) result = HALF;
  // A full disk still removes and renames; a failing one does not.
  int can_fail = error_number == ENOSPC ? kind & (MAKES | WRITES) : 1;
  if (n >= at && (mode == FAIL || mode == FAIL_ONCE) && can_fail) {
    if (mode == FAIL_ONCE) mode = COUNT;
    result = REFUSED;
  }
  if (mode == POWER && (kind & WRITES)) note_write(file);
  if (mode == POWER && (kind & SYNCS)) note_sync(file);
  if (result != HALF) pthread_mutex_unlock(&mutex);  // no other thread goes on after a half
  if (result == REFUSED) errno = error_number;
  return result;
}

static int change_of_name(const char *what, int start, const char *name, int kind) {
  if (!mode && log_file < 0) return DONE;
  char path[PATH_MAX];
  of_name(start, name, path);
  return change(what, path, kind, -1);
}

static int change_of_file(const char *what, int file, int kind) {
  if (!mode && log_file < 0) return DONE;
  char path[PATH_MAX];
  of_file(file, path);
  return change(what, path, kind, file);
}

#define REAL(name) \
  static __typeof__(name) *real; \
  if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define OPENS(name, start, path, flags, call) \
  { \
    REAL(name); \
    mode_t bits = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { \
      va_list rest; \
      va_start(rest, flags); \
      bits = va_arg(rest, mode_t); \
      va_end(rest); \
    } \
    if ((flags & (O_CREAT | O_TRUNC)) && change_of_name("open", start, path, MAKES)) return -1; \
    return call; \
  }
int open(const char *path, int flags, ...) OPENS(open, AT_FDCWD, path, flags, real(path, flags, bits))
int open64(const char *path, int flags, ...) OPENS(open64, AT_FDCWD, path, flags, real(path, flags, bits))
int openat(int start, const char *path, int flags, ...) OPENS(openat, start, path, flags, real(start, path, flags, bits))
int openat64(int start, const char *path, int flags, ...) OPENS(openat64, start, path, flags, real(start, path, flags, bits))

#define OPENS_STREAM(name) \
  FILE *name(const char *path, const char *how) { \
    REAL(name); \
    if (strpbrk(how, "wa") && change_of_name("open", AT_FDCWD, path, MAKES)) return NULL; \
    return real(path, how); \
  }
OPENS_STREAM(fopen)
OPENS_STREAM(fopen64)

#define NAMED(name, parameters, what, start, path, kind, call) \
  int name parameters { \
    REAL(name); \
    return change_of_name(what, start, path, kind) ? -1 : call; \
  }
NAMED(mkdir, (const char *path, mode_t bits), "mkdir", AT_FDCWD, path, MAKES, real(path, bits))
NAMED(mkdirat, (int start, const char *path, mode_t bits), "mkdir", start, path, MAKES, real(start, path, bits))
NAMED(rmdir, (const char *path), "rmdir", AT_FDCWD, path, 0, real(path))
NAMED(unlink, (const char *path), "unlink", AT_FDCWD, path, 0, real(path))
NAMED(unlinkat, (int start, const char *path, int flags), "unlink", start, path, 0, real(start, path, flags))
NAMED(rename, (const char *from, const char *to), "rename", AT_FDCWD, to, 0, real(from, to))
NAMED(renameat, (int a, const char *from, int b, const char *to), "rename", b, to, 0, real(a, from, b, to))
NAMED(renameat2, (int a, const char *from, int b, const char *to, unsigned flags), "rename", b, to, 0, real(a, from, b, to, flags))
NAMED(link, (const char *from, const char *to), "link", AT_FDCWD, to, MAKES, real(from, to))
NAMED(linkat, (int a, const char *from, int b, const char *to, int flags), "link", b, to, MAKES, real(a, from, b, to, flags))
NAMED(symlink, (const char *from, const char *to), "link", AT_FDCWD, to, MAKES, real(from, to))
NAMED(truncate, (const char *path, off_t size), "truncate", AT_FDCWD, path, 0, real(path, size))

#define SYNC(name) \
  int name(int file) { \
    REAL(name); \
    return change_of_file("sync", file, SYNCS) ? -1 : real(file); \
  }
SYNC(fsync)
SYNC(fdatasync)

#define TRUNCATE(name, type) \
  int name(int file, type size) { \
    REAL(name); \
    return change_of_file("truncate", file, 0) ? -1 : real(file, size); \
  }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

// half: how the first half of the bytes is written.
#define WRITE(name, parameters, half, call) \
  ssize_t name parameters { \
    REAL(name); \
    int result = change_of_file("write", file, WRITES); \
    if (result == REFUSED) return -1; \
    if (result == HALF) { \
      half; \
      die(); \
    } \
    return call; \
  }
WRITE(write, (int file, const void *bytes, size_t size), real(file, bytes, size / 2), real(file, bytes, size))
WRITE(pwrite, (int file, const void *bytes, size_t size, off_t place), real(file, bytes, size / 2, place), real(file, bytes, size, place))
WRITE(pwrite64, (int file, const void *bytes, size_t size, off64_t place), real(file, bytes, size / 2, place), real(file, bytes, size, place))
WRITE(writev, (int file, const struct iovec *parts, int n), { if (n > 1) real(file, parts, n / 2); else syscall(SYS_write, file, parts->iov_base, parts->iov_len / 2); }, real(file, parts, n))
WRITE(sendfile, (int file, int from, off_t *start, size_t size), real(file, from, start, size / 2), real(file, from, start, size))
WRITE(sendfile64, (int file, int from, off64_t *start, size_t size), real(file, from, start, size / 2), real(file, from, start, size))

size_t fwrite(const void *bytes, size_t size, size_t n, FILE *stream) {
  REAL(fwrite);
  int result = change_of_file("write", fileno(stream), WRITES);
  if (result == REFUSED) return 0;
  if (result == HALF) {
    real(bytes, size, n / 2, stream);
    fflush(stream);
    die();
  }
  return real(bytes, size, n, stream);
}
