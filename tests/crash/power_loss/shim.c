/* Writes down what a process asks of its disk, for a checker to rebuild what a power cut could have left.
 *
 *     LD_PRELOAD=shim.so POWER_LOSS_TRACE=/somewhere/trace program
 *
 * Traced are the files called data.mdb (LMDB's), acks (to which the program writes one mark for each promise that it
 * made), and the directories in the one that holds the trace. The trace is a sequence of entries, each in the order in
 * which its call returned:
 *
 *     kind u8 · durable u8 · six zero bytes · inode u64 · offset u64 · length u64 · length bytes, but for T, S and E
 *
 *     W  write; durable when the descriptor is O_DSYNC or O_SYNC, as the one for LMDB's meta pages
 *     T  the file was cut or grown to `length`
 *     S  fsync, fdatasync or msync: every W to this file before it is on disk
 *     A  mark
 *     E  a call that was made to fail; see below
 *     C  a data.mdb was made; the bytes are its path
 *     M  mkdir   U  unlink of a data.mdb   X  rmdir   D  fsync of a directory: the bytes are its path
 *     R  rename; the bytes are both paths, with a zero byte between
 *
 * One call fails with EIO, once, when a file called TRACE.fail-sync (the next fsync or fdatasync of a data.mdb) or
 * TRACE.fail-meta (its next durable write) exists. The call takes that file away; the one after it succeeds, as Linux
 * has it: whoever tries again is told that all is well, about data that is gone.
 *
 * What always holds: one lock is held around each call and its entry, so the trace is an order that happened. Writes
 * through a writable map are not seen; LMDB makes them only with writemap, and then nothing the checker rebuilds opens.
 * Nor are calls relative to a directory's descriptor, which the log does not make.
 */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum file { OTHER, DATA, ACKS };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int trace_fd = -1;
static char fail_sync_path[4096], fail_meta_path[4096], root[4096];

__attribute__((constructor)) static void open_trace(void) {
    const char *path = getenv("POWER_LOSS_TRACE");
    if (path == NULL) return;
    trace_fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    snprintf(fail_sync_path, sizeof fail_sync_path, "%s.fail-sync", path);
    snprintf(fail_meta_path, sizeof fail_meta_path, "%s.fail-meta", path);
    snprintf(root, sizeof root, "%s", path);
    char *end = strrchr(root, '/');
    if (end != NULL) *end = 0;
}

static int path_of(int fd, char *path, size_t size) {
    char link[64];
    int error = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, size - 1);
    errno = error;
    if (length < 0) return 0;
    path[length] = 0;
    return 1;
}

static int is_called(const char *path, const char *name) {
    const char *last = strrchr(path, '/');
    return strcmp(last == NULL ? path : last + 1, name) == 0;
}

static enum file which(int fd) {
    char path[4096];
    if (trace_fd < 0 || !path_of(fd, path, sizeof path)) return OTHER;
    return is_called(path, "data.mdb") ? DATA : is_called(path, "acks") ? ACKS : OTHER;
}

/* Inside the directory that holds the trace, and worth an entry: a directory, or a data.mdb. */
static int is_watched(const char *path, int directory) {
    size_t length = strlen(root);
    if (trace_fd < 0 || strncmp(path, root, length) != 0) return 0;
    return directory ? path[length] == '/' || path[length] == 0 : path[length] == '/' && is_called(path, "data.mdb");
}

static uint64_t inode_of(int fd) {
    struct stat about;
    int error = errno;
    uint64_t inode = fstat(fd, &about) == 0 ? about.st_ino : 0;
    errno = error;
    return inode;
}

static int is_durable(int fd) { return (fcntl(fd, F_GETFL) & O_DSYNC) != 0; /* O_SYNC contains that bit */ }

static int must_fail(const char *path) { return syscall(SYS_unlinkat, AT_FDCWD, path, 0) == 0; }

/* The real writes, not ours: the trace must not trace itself. */
static void put(const void *bytes, size_t length) {
    if (syscall(SYS_write, trace_fd, bytes, length) != (ssize_t)length) abort(); /* half a trace would prove nothing */
}

static void enter(char kind, int durable, uint64_t inode, uint64_t offset, uint64_t length) {
    struct { uint8_t kind, durable, zero[6]; uint64_t inode, offset, length; } entry = {kind, durable, {0}, inode, offset, length};
    put(&entry, sizeof entry);
}

static void enter_paths(char kind, uint64_t inode, const char *path, const char *other) {
    size_t length = strlen(path), more = other == NULL ? 0 : strlen(other) + 1;
    enter(kind, 0, inode, 0, length + more);
    put(path, length);
    if (other != NULL) {
        put("", 1);
        put(other, more - 1);
    }
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
            enter('E', 0, inode_of(fd), at, written); /* in the cache it is, on the disk perhaps */
            written = -1;
            error = EIO;
        } else {
            size_t left = written;
            enter(file == DATA ? 'W' : 'A', durable, inode_of(fd), at, written);
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
    char path[4096];
    struct stat about;
    int data = which(fd) == DATA;
    int directory = !data && path_of(fd, path, sizeof path) && is_watched(path, 1) && fstat(fd, &about) == 0 &&
                    S_ISDIR(about.st_mode);
    if (!data && !directory) return sync(fd);
    pthread_mutex_lock(&lock);
    int fails = data && must_fail(fail_sync_path);
    int result = fails ? -1 : sync(fd);
    int error = fails ? EIO : errno;
    if (directory && result == 0) enter_paths('D', 0, path, NULL);
    if (data && (result == 0 || fails)) enter(fails ? 'E' : 'S', 0, inode_of(fd), 0, 0);
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
    if (result == 0 && which(fd) == DATA) enter('T', 0, inode_of(fd), 0, length);
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
    if (result == 0 && trace_fd >= 0) enter('S', 0, 0, 0, 0); /* of which file is not known: the checker refuses it */
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

/* -- names ---------------------------------------------------------------------------------------------------------- */

static int traced_open(int directory, const char *path, int flags, mode_t mode) {
    struct stat about;
    int watched = (flags & O_CREAT) && directory == AT_FDCWD && is_watched(path, 0);
    if (!watched) return syscall(SYS_openat, directory, path, flags, mode);
    pthread_mutex_lock(&lock);
    int is_new = stat(path, &about) != 0;
    int fd = syscall(SYS_openat, directory, path, flags, mode), error = errno;
    if (fd >= 0 && is_new) enter_paths('C', inode_of(fd), path, NULL);
    pthread_mutex_unlock(&lock);
    errno = error;
    return fd;
}

#define MODE(flags) ({ mode_t mode = 0; if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) { va_list list; va_start(list, flags); \
                       mode = va_arg(list, mode_t); va_end(list); } mode; })

int open(const char *path, int flags, ...) { return traced_open(AT_FDCWD, path, flags, MODE(flags)); }

int open64(const char *path, int flags, ...) { return traced_open(AT_FDCWD, path, flags, MODE(flags)); }

int openat(int directory, const char *path, int flags, ...) { return traced_open(directory, path, flags, MODE(flags)); }

int openat64(int directory, const char *path, int flags, ...) { return traced_open(directory, path, flags, MODE(flags)); }

static int traced_name(char kind, int watched, int (*call)(const char *), const char *path) {
    if (!watched) return call(path);
    pthread_mutex_lock(&lock);
    int result = call(path), error = errno;
    if (result == 0) enter_paths(kind, 0, path, NULL);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

int unlink(const char *path) { return traced_name('U', is_watched(path, 0), REAL(unlink), path); }

int rmdir(const char *path) { return traced_name('X', is_watched(path, 1), REAL(rmdir), path); }

int mkdir(const char *path, mode_t mode) {
    pthread_mutex_lock(&lock);
    int result = REAL(mkdir)(path, mode), error = errno;
    if (result == 0 && is_watched(path, 1)) enter_paths('M', 0, path, NULL);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}

int rename(const char *from, const char *to) {
    pthread_mutex_lock(&lock);
    int result = REAL(rename)(from, to), error = errno;
    if (result == 0 && is_watched(from, 1) && is_watched(to, 1)) enter_paths('R', 0, from, to);
    pthread_mutex_unlock(&lock);
    errno = error;
    return result;
}
