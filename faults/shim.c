/* Fails or ends a process at the Nth input/output call below one folder. For LD_PRELOAD on Linux; see runner.py.

   Nothing happens until `fault_arm` is called. Counted are calls that change what is on the disk, and opens for reading
   if asked for. Where the process is to be killed in a write, half of its bytes are written first: a torn write. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { COUNT = 0, KILL = -1 }; /* an action above 0 is an errno */

static atomic_long seen;
static long at, last;
static int action, journal = -1, reads, armed;
static char root[PATH_MAX];

/* root: with a slash at its end; until: the last call that fails (at: that one alone); fd: where calls are noted. */
void fault_arm(const char *folder, long first, long until, int what, int fd, int with_reads) {
    snprintf(root, sizeof root, "%s", folder);
    seen = 0, at = first, last = until, action = what, journal = fd, reads = with_reads, armed = 1;
}

long fault_count(void) { return seen; }

static int below(int dir, const char *path) {
    char full[2 * PATH_MAX], link[64];
    if (!armed || !path) return 0;
    if (path[0] == '/') return !strncmp(path, root, strlen(root));
    if (dir == AT_FDCWD) {
        if (!getcwd(full, PATH_MAX)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t n = readlink(link, full, PATH_MAX - 1);
        if (n < 0) return 0;
        full[n] = 0;
    }
    strcat(full, "/");
    strncat(full, path, PATH_MAX - 1);
    return !strncmp(full, root, strlen(root));
}

static int below_fd(int fd) {
    char link[64], full[PATH_MAX];
    if (!armed || fd == journal) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, full, sizeof full - 1);
    if (n < 0) return 0;
    full[n] = 0;
    strcat(full, "/"); /* the root itself, opened to be synced */
    return !strncmp(full, root, strlen(root));
}

/* 0: go on; 1: fail, errno is set; 2: this is where the process ends. */
static int event(const char *kind, const char *path) {
    long n = ++seen;
    if (journal >= 0) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%ld %s %s\n", n, kind, path ? path : "");
        syscall(SYS_write, journal, line, length);
    }
    if (action == COUNT || n < at || n > last) return 0;
    if (action == KILL) return 2;
    errno = action;
    return 1;
}

static void die(void) {
    syscall(SYS_kill, getpid(), SIGKILL);
    pause();
}

static int at_path(const char *kind, int dir, const char *path) {
    if (!below(dir, path)) return 0;
    int what = event(kind, path);
    if (what == 2) die();
    return what;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int opened(int dir, const char *path, int flags) {
    int writes = flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC);
    if (!writes && !reads) return 0;
    return at_path(writes ? "open" : "read", dir, path);
}

#define OPEN(name)                                                      \
    int name(const char *path, int flags, ...) {                        \
        va_list more;                                                   \
        va_start(more, flags);                                          \
        int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, int) : 0; \
        va_end(more);                                                   \
        return opened(AT_FDCWD, path, flags) ? -1 : REAL(name)(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                    \
    int name(int dir, const char *path, int flags, ...) {               \
        va_list more;                                                   \
        va_start(more, flags);                                          \
        int mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, int) : 0; \
        va_end(more);                                                   \
        return opened(dir, path, flags) ? -1 : REAL(name)(dir, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                     \
    FILE *name(const char *path, const char *mode) {                    \
        int flags = strchr(mode, 'r') && !strchr(mode, '+') ? O_RDONLY : O_RDWR; \
        return opened(AT_FDCWD, path, flags) ? NULL : REAL(name)(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int fd, const void *data, size_t count) {
    int what = below_fd(fd) ? event("write", NULL) : 0;
    if (what == 2) {
        syscall(SYS_write, fd, data, count / 2);
        die();
    }
    return what ? -1 : syscall(SYS_write, fd, data, count);
}

#define AT_FD(kind, name, parameters, ...)                              \
    __typeof__(name(__VA_ARGS__)) name parameters {                     \
        int what = below_fd(fd) ? event(kind, NULL) : 0;                \
        if (what == 2) die();                                           \
        return what ? -1 : REAL(name)(__VA_ARGS__);                     \
    }
static int fd;
static const void *data;
static const struct iovec *parts;
static size_t size;
static int count;
static off_t offset;
AT_FD("write", writev, (int fd, const struct iovec *parts, int count), fd, parts, count)
AT_FD("write", pwrite, (int fd, const void *data, size_t size, off_t offset), fd, data, size, offset)
AT_FD("write", pwrite64, (int fd, const void *data, size_t size, off_t offset), fd, data, size, offset)
AT_FD("fsync", fsync, (int fd), fd)
AT_FD("fsync", fdatasync, (int fd), fd)
AT_FD("truncate", ftruncate, (int fd, off_t offset), fd, offset)
AT_FD("truncate", ftruncate64, (int fd, off_t offset), fd, offset)

int rename(const char *from, const char *to) { return at_path("rename", AT_FDCWD, to) ? -1 : REAL(rename)(from, to); }
int renameat(int a, const char *from, int b, const char *to) {
    return at_path("rename", b, to) ? -1 : REAL(renameat)(a, from, b, to);
}
int unlink(const char *path) { return at_path("unlink", AT_FDCWD, path) ? -1 : REAL(unlink)(path); }
int unlinkat(int dir, const char *path, int flags) {
    return at_path("unlink", dir, path) ? -1 : REAL(unlinkat)(dir, path, flags);
}
int rmdir(const char *path) { return at_path("unlink", AT_FDCWD, path) ? -1 : REAL(rmdir)(path); }
int mkdir(const char *path, mode_t mode) { return at_path("mkdir", AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode); }
int mkdirat(int dir, const char *path, mode_t mode) {
    return at_path("mkdir", dir, path) ? -1 : REAL(mkdirat)(dir, path, mode);
}
