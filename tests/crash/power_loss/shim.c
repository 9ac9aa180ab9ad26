/* Writes down what a process asks of its disk, for a checker to rebuild what a power cut could have left.
 *
 *     LD_PRELOAD=shim.so POWER_LOSS_TRACE=/somewhere/trace program
 *
 * Traced are the files called data.mdb (LMDB's) and acks (to which the program writes one mark for each promise that it
 * made). The trace is a sequence of entries, each in the order in which its call returned:
 *
 *     kind u8 · durable u8 · six zero bytes · offset u64 · length u64 · for W and A: that many bytes
 *
 *     W  write; durable when the descriptor is O_DSYNC or O_SYNC, as the one for LMDB's meta pages
 *     T  the file was cut or grown to `length`
 *     S  fsync, fdatasync or msync: every W before it is on disk
 *     A  mark
 *     E  a call that was made to fail; see below
 *
 * One call fails with EIO, once, when a file called TRACE.fail-sync (the next fsync or fdatasync of data.mdb) or
 * TRACE.fail-meta (its next durable write) exists. The call takes that file away; the one after it succeeds, as Linux
 * has it: whoever tries again is told that all is well, about data that is gone.
 *
 * What always holds: one lock is held around each call and its entry, so the trace is an order that happened. Writes
 * through a writable map are not seen; LMDB makes them only with writemap, and then nothing the checker rebuilds opens.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum file { OTHER, DATA, ACKS };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int trace_fd = -1;
static char fail_sync_path[4096], fail_meta_path[4096];

__attribute__((constructor)) static void open_trace(void) {
    const char *path = getenv("POWER_LOSS_TRACE");
    if (path == NULL) return;
    trace_fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    snprintf(fail_sync_path, sizeof fail_sync_path, "%s.fail-sync", path);
    snprintf(fail_meta_path, sizeof fail_meta_path, "%s.fail-meta", path);
}

static enum file which(int fd) {
    char link[64], path[4096];
    int error = errno;
    if (trace_fd < 0) return OTHER;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = error;
    if (length < 0) return OTHER;
    path[length] = 0;
    const char *name = strrchr(path, '/');
    if (name == NULL) return OTHER;
    return strcmp(name, "/data.mdb") == 0 ? DATA : strcmp(name, "/acks") == 0 ? ACKS : OTHER;
}

static int is_durable(int fd) { return (fcntl(fd, F_GETFL) & O_DSYNC) != 0; /* O_SYNC contains that bit */ }

static int must_fail(const char *path) { return unlink(path) == 0; }

/* The real writes, not ours: the trace must not trace itself. */
static void put(const void *bytes, size_t length) {
    if (syscall(SYS_write, trace_fd, bytes, length) != (ssize_t)length) abort(); /* half a trace would prove nothing */
}

static void enter(char kind, int durable, uint64_t offset, uint64_t length) {
    struct { uint8_t kind, durable, zero[6]; uint64_t offset, length; } entry = {kind, durable, {0}, offset, length};
    put(&entry, sizeof entry);
}

static ssize_t traced_write(int fd, enum file file, const struct iovec *parts, int count, off_t offset, int positioned) {
    pthread_mutex_lock(&lock);
    off_t at = positioned ? offset : lseek(fd, 0, SEEK_CUR);
    ssize_t written = positioned ? syscall(SYS_pwritev, fd, parts, count, offset, 0)
                                 : syscall(SYS_writev, fd, parts, count);
    int error = errno;
    if (written > 0) {
        int durable = file == DATA && is_durable(fd);
        int fails = durable && must_fail(fail_meta_path);
        if (fails) {
            enter('E', 0, at, written); /* in the cache it is, on the disk perhaps */
            written = -1;
            error = EIO;
        } else {
            size_t left = written;
            enter(file == DATA ? 'W' : 'A', durable, at, written);
            for (int i = 0; i < count && left > 0; i++) {
                size_t length = parts[i].iov_len < left ? parts[i].iov_len : left;
                put(parts[i].iov_base, length);
                left -= length;
            }
        }
    }
    pthread_mutex_unlock(&lock);
    errno = error;
    return written;
}

static int traced_sync(int (*sync)(int), int fd) {
    if (which(fd) != DATA) return sync(fd);
    pthread_mutex_lock(&lock);
    int fails = must_fail(fail_sync_path);
    int result = fails ? -1 : sync(fd);
    int error = fails ? EIO : errno;
    if (result == 0 || fails) enter(fails ? 'E' : 'S', 0, 0, 0);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *bytes, size_t length) {
    enum file file = which(fd);
    struct iovec part = {(void *)bytes, length};
    return file == OTHER ? syscall(SYS_write, fd, bytes, length) : traced_write(fd, file, &part, 1, 0, 0);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    enum file file = which(fd);
    return file == OTHER ? syscall(SYS_writev, fd, parts, count) : traced_write(fd, file, parts, count, 0, 0);
}

ssize_t pwrite(int fd, const void *bytes, size_t length, off_t offset) {
    enum file file = which(fd);
    struct iovec part = {(void *)bytes, length};
    return file == OTHER ? syscall(SYS_pwrite64, fd, bytes, length, offset) : traced_write(fd, file, &part, 1, offset, 1);
}

ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t offset) {
    enum file file = which(fd);
    return file == OTHER ? syscall(SYS_pwritev, fd, parts, count, offset, 0) : traced_write(fd, file, parts, count, offset, 1);
}

ssize_t pwrite64(int fd, const void *bytes, size_t length, off64_t offset) { return pwrite(fd, bytes, length, offset); }

ssize_t pwritev64(int fd, const struct iovec *parts, int count, off64_t offset) {
    return pwritev(fd, parts, count, offset);
}

int ftruncate(int fd, off_t length) {
    pthread_mutex_lock(&lock);
    int result = syscall(SYS_ftruncate, fd, length), error = errno;
    if (result == 0 && which(fd) == DATA) enter('T', 0, 0, length);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

int ftruncate64(int fd, off64_t length) { return ftruncate(fd, length); }

int fsync(int fd) { return traced_sync(REAL(fsync), fd); }

int fdatasync(int fd) { return traced_sync(REAL(fdatasync), fd); }

int msync(void *address, size_t length, int flags) {
    pthread_mutex_lock(&lock);
    int result = REAL(msync)(address, length, flags), error = errno;
    if (result == 0 && trace_fd >= 0) enter('S', 0, 0, 0);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}
