// Preloaded into a process whose checkpoint writer is to meet a bad disk. FAULT names what files
// whose path contains "faulty" suffer; all others are left alone.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static atomic_int calls;
static atomic_int syncs;

static int is_faulty(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
    const ssize_t length = readlink(link, path, sizeof(path) - 1);
    if (length < 0) {
        return 0;
    }
    path[length] = 0;
    return strstr(path, "faulty") != NULL;
}

static int has(int fd, const char *fault) {
    const char *wanted = getenv("FAULT");
    return wanted != NULL && strcmp(wanted, fault) == 0 && is_faulty(fd);
}

static ssize_t fails(int code) {
    errno = code;
    return -1;
}

static ssize_t write_at(int fd, const void *data, size_t size, off_t offset) {
    static ssize_t (*next)(int, const void *, size_t, off_t);
    if (next == NULL) {
        next = (ssize_t(*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite64");
    }
    const int call = atomic_fetch_add(&calls, 1);
    if (has(fd, "write_eio") && offset >= 8192) {
        return fails(EIO);
    }
    if (has(fd, "write_enospc") && offset >= 8192) {
        return fails(ENOSPC);
    }
    if (has(fd, "direct_einval") && (fcntl(fd, F_GETFL) & O_DIRECT)) {
        return fails(EINVAL);
    }
    if (has(fd, "eintr") && call % 2 == 0) {
        return fails(EINTR);
    }
    if (has(fd, "eagain") && call % 2 == 0) {
        return fails(EAGAIN);
    }
    if (has(fd, "short") && (fcntl(fd, F_GETFL) & O_DIRECT) && (offset % 4096 || size % 4096)) {
        fprintf(stderr, "direct write that does not begin or end on a page\n");
    }
    if (has(fd, "short") && size > 3 && call % 3 != 0) {
        const ssize_t written = next(fd, data, size, offset);
        return written < 0 ? written : written / 2 + call % 3; // also ends inside a page
    }
    if (has(fd, "nothing")) {
        return 0;
    }
    while (has(fd, "hang")) {
        pause();
    }
    return next(fd, data, size, offset);
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    return write_at(fd, data, size, offset);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset) {
    return write_at(fd, data, size, offset);
}

int fdatasync(int fd) {
    static int (*next)(int);
    if (next == NULL) {
        next = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    }
    if (has(fd, "sync_eio")) {
        if (atomic_fetch_add(&syncs, 1) > 0) {
            fprintf(stderr, "synced again after an error\n");
        }
        return (int)fails(EIO);
    }
    while (has(fd, "sync_hang")) {
        pause();
    }
    return next(fd);
}

int fallocate(int fd, int mode, off_t offset, off_t size) {
    static int (*next)(int, int, off_t, off_t);
    if (next == NULL) {
        next = (int (*)(int, int, off_t, off_t))dlsym(RTLD_NEXT, "fallocate64");
    }
    if (has(fd, "reserve_enospc")) {
        return (int)fails(ENOSPC);
    }
    if (has(fd, "reserve_partly") && offset + size > 100000) {
        next(fd, mode, offset, size / 2); // as ext4 does where the space ends on the way
        return (int)fails(ENOSPC);
    }
    if (has(fd, "reserve_unsupported")) {
        return (int)fails(EOPNOTSUPP);
    }
    return next(fd, mode, offset, size);
}
int fallocate64(int fd, int mode, off_t offset, off_t size) {
    return fallocate(fd, mode, offset, size);
}
