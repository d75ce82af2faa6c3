/* Records what a process does to the files below a folder, in the order in which it happens, for campaign.py to replay.
 *
 * Preloaded into it (LD_PRELOAD; Linux). RECORDED names the folder, RECORD the file that gets the records, each:
 * kind (1 byte), offset and number of bytes (8 bytes each), lengths of two paths (4 bytes each), the paths, the bytes.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER;
static int records = -1;
static const char *folder;

__attribute__((constructor)) static void begin(void) {
    folder = getenv("RECORDED");
    const char *path = getenv("RECORD");
    if (folder && path)
        records = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static int is_below(const char *path) {
    return records >= 0 && folder && strncmp(path, folder, strlen(folder)) == 0;
}

static void resolved(const char *path, char *out) {
    if (path[0] == '/' || !getcwd(out, PATH_MAX)) {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    size_t length = strlen(out);
    snprintf(out + length, PATH_MAX - length, "/%s", path);
}

static int named(int descriptor, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, out, PATH_MAX - 1);
    if (length < 0)
        return 0;
    out[length] = 0;
    return is_below(out);
}

static void record(char kind, const char *path, const char *other, uint64_t offset, const void *data, uint64_t nbytes,
                   uint64_t stated) {
    uint32_t lengths[2] = {strlen(path), strlen(other)};
    struct iovec parts[] = {
        {&kind, 1}, {&offset, 8}, {&stated, 8}, {lengths, 8}, {(void *)path, lengths[0]}, {(void *)other, lengths[1]},
        {(void *)data, data ? nbytes : 0}};
    if (syscall(SYS_writev, records, parts, 7) < 0)
        abort();
}

#define ORIGINAL(type, name, ...)                                                                                      \
    static type (*original)(__VA_ARGS__);                                                                              \
    if (!original)                                                                                                     \
        original = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name);

static int opened(int descriptor, int flags, int existed) {
    char path[PATH_MAX];
    if (descriptor >= 0 && (flags & (O_CREAT | O_TRUNC)) && named(descriptor, path)) {
        if (!existed)
            record('c', path, "", 0, NULL, 0, 0);
        if (flags & O_TRUNC)
            record('t', path, "", 0, NULL, 0, 0);
    }
    return descriptor;
}

static int existing(int at, const char *path) {
    struct stat found;
    return fstatat(at, path, &found, 0) == 0;
}

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        ORIGINAL(int, #name, const char *, int, ...)                                                                   \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode_t mode = va_arg(rest, mode_t);                                                                            \
        va_end(rest);                                                                                                  \
        if (!(flags & (O_CREAT | O_TRUNC)))                                                                            \
            return original(path, flags, mode);                                                                        \
        pthread_mutex_lock(&order);                                                                                    \
        int existed = existing(AT_FDCWD, path), descriptor = opened(original(path, flags, mode), flags, existed);      \
        pthread_mutex_unlock(&order);                                                                                  \
        return descriptor;                                                                                             \
    }
OPEN(open)
OPEN(open64)

static void written(int descriptor, const void *data, ssize_t count, int64_t offset) {
    char path[PATH_MAX];
    if (count > 0 && named(descriptor, path))
        record('w', path, "", offset >= 0 ? offset : lseek(descriptor, 0, SEEK_CUR) - count, data, count, count);
}

ssize_t write(int descriptor, const void *data, size_t nbytes) {
    ORIGINAL(ssize_t, "write", int, const void *, size_t)
    char path[PATH_MAX];
    if (records < 0 || !named(descriptor, path))
        return original(descriptor, data, nbytes);
    pthread_mutex_lock(&order);
    ssize_t count = original(descriptor, data, nbytes);
    written(descriptor, data, count, -1);
    pthread_mutex_unlock(&order);
    return count;
}

#define PWRITE(name)                                                                                                   \
    ssize_t name(int descriptor, const void *data, size_t nbytes, off_t offset) {                                      \
        ORIGINAL(ssize_t, #name, int, const void *, size_t, off_t)                                                     \
        pthread_mutex_lock(&order);                                                                                    \
        ssize_t count = original(descriptor, data, nbytes, offset);                                                    \
        written(descriptor, data, count, offset);                                                                      \
        pthread_mutex_unlock(&order);                                                                                  \
        return count;                                                                                                  \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define SIZED(name, kind, type, parameters, arguments, size)                                                           \
    int name parameters {                                                                                              \
        static int(*original) parameters;                                                                              \
        if (!original)                                                                                                 \
            original = (int(*) parameters)dlsym(RTLD_NEXT, #name);                                                     \
        char path[PATH_MAX];                                                                                           \
        pthread_mutex_lock(&order);                                                                                    \
        int result = original arguments;                                                                               \
        if (result == 0 && named(descriptor, path))                                                                    \
            record(kind, path, "", size, NULL, 0, 0);                                                                  \
        pthread_mutex_unlock(&order);                                                                                  \
        return result;                                                                                                 \
    }
SIZED(ftruncate, 't', int, (int descriptor, off_t nbytes), (descriptor, nbytes), nbytes)
SIZED(ftruncate64, 't', int, (int descriptor, off_t nbytes), (descriptor, nbytes), nbytes)
SIZED(posix_fallocate, 'a', int, (int descriptor, off_t at, off_t nbytes), (descriptor, at, nbytes), at + nbytes)
SIZED(posix_fallocate64, 'a', int, (int descriptor, off_t at, off_t nbytes), (descriptor, at, nbytes), at + nbytes)
SIZED(fsync, 's', int, (int descriptor), (descriptor), 0)
SIZED(fdatasync, 's', int, (int descriptor), (descriptor), 0)

int rename(const char *from, const char *to) {
    ORIGINAL(int, "rename", const char *, const char *)
    char a[PATH_MAX], b[PATH_MAX];
    resolved(from, a);
    resolved(to, b);
    pthread_mutex_lock(&order);
    int result = original(from, to);
    if (result == 0 && is_below(b))
        record('r', a, b, 0, NULL, 0, 0);
    pthread_mutex_unlock(&order);
    return result;
}

static int linked(int result, const char *from, const char *to) {
    char a[PATH_MAX], b[PATH_MAX];
    resolved(from, a);
    resolved(to, b);
    if (result == 0 && is_below(b))
        record('l', a, b, 0, NULL, 0, 0);
    pthread_mutex_unlock(&order);
    return result;
}

int link(const char *from, const char *to) {
    ORIGINAL(int, "link", const char *, const char *)
    pthread_mutex_lock(&order);
    return linked(original(from, to), from, to);
}

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags) {
    ORIGINAL(int, "linkat", int, const char *, int, const char *, int)
    pthread_mutex_lock(&order);
    return linked(original(from_folder, from, to_folder, to, flags), from, to);
}

#define NAMED(name, kind, parameters, arguments)                                                                       \
    int name parameters {                                                                                              \
        static int(*original) parameters;                                                                              \
        if (!original)                                                                                                 \
            original = (int(*) parameters)dlsym(RTLD_NEXT, #name);                                                     \
        char full[PATH_MAX];                                                                                           \
        resolved(path, full);                                                                                          \
        pthread_mutex_lock(&order);                                                                                    \
        int result = original arguments;                                                                               \
        if (result == 0 && is_below(full))                                                                             \
            record(kind, full, "", 0, NULL, 0, 0);                                                                     \
        pthread_mutex_unlock(&order);                                                                                  \
        return result;                                                                                                 \
    }
NAMED(unlink, 'u', (const char *path), (path))
NAMED(rmdir, 'd', (const char *path), (path))
NAMED(mkdir, 'm', (const char *path, mode_t mode), (path, mode))
