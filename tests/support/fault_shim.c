/* Faults of the machine, for a process that is started with LD_PRELOAD: what its control page says at this moment.

   FAULT_SHIM_PAGE names a file of 4096 bytes, shared with the test:
   byte 0       whether writes, syncs, renames and openings for writing below a folder fail with EIO
   bytes 8-15   nanoseconds by which the real-time clock is wrong
   bytes 64-    that folder */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

static volatile char *page;

__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("FAULT_SHIM_PAGE");
    int fd = name ? syscall(SYS_openat, AT_FDCWD, name, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *found = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
    syscall(SYS_close, fd);
    if (found != MAP_FAILED) page = found;
}

static int below(const char *path) {
    const char *folder = (const char *)page + 64;
    return path && !strncmp(path, folder, strlen(folder));
}

static int fails(int fd) {
    if (!page || !page[0]) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define BY_FILE(kind, name, parameters, arguments)            \
    kind name parameters {                                    \
        static __typeof__(&name) real;                        \
        if (!real) real = REAL(name);                         \
        if (fails(fd)) { errno = EIO; return -1; }            \
        return real arguments;                                \
    }

BY_FILE(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
BY_FILE(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
BY_FILE(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
BY_FILE(int, fsync, (int fd), (fd))
BY_FILE(int, fdatasync, (int fd), (fd))

int rename(const char *from, const char *to) {
    if (page && page[0] && below(to)) { errno = EIO; return -1; }
    return REAL(rename)(from, to);
}

static int opens(const char *path, int flags) {
    return page && page[0] && (flags & (O_WRONLY | O_RDWR | O_CREAT)) && below(path);
}

#define OPENS(name)                                           \
    int name(const char *path, int flags, ...) {              \
        va_list more;                                         \
        va_start(more, flags);                                \
        mode_t mode = va_arg(more, mode_t);                   \
        va_end(more);                                         \
        if (opens(path, flags)) { errno = EIO; return -1; }   \
        return REAL(name)(path, flags, mode);                 \
    }
OPENS(open)
OPENS(open64)

static int64_t wrong(void) { return page ? *(volatile int64_t *)(page + 8) : 0; }

int clock_gettime(clockid_t which, struct timespec *now) {
    int code = syscall(SYS_clock_gettime, which, now);
    int64_t by = which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE ? wrong() : 0;
    if (!code && by) {
        int64_t all = now->tv_sec * INT64_C(1000000000) + now->tv_nsec + by;
        now->tv_sec = all / 1000000000;
        now->tv_nsec = all % 1000000000;
    }
    return code;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec fine;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &fine);
    now->tv_sec = fine.tv_sec;
    now->tv_usec = fine.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *where) {
    struct timespec fine;
    clock_gettime(CLOCK_REALTIME, &fine);
    if (where) *where = fine.tv_sec;
    return fine.tv_sec;
}
