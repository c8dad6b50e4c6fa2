/* Preloaded before libc: counts the file calls below one directory and disturbs one of them.
 *
 * HDF5, FAISS, PyTorch, safetensors and Python all reach the disk through these functions.
 * A process is left alone until it calls shim_arm().
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* what a call does: the bits of `kinds` in shim_arm */
enum { NAMES = 1, SPACE = 2, OTHER = 4, READS = 8 };
/* what happens at call number `target` */
enum { COUNT, KILL, KILL_HALF, FAIL_ONCE, FAIL_ALWAYS, SHORT, STOP };
/* what decide() answers when it is not an errno */
enum { GO = 0, HALF = -1 };

static char root[PATH_MAX];
static size_t root_length;
static int action, error_number, counted_kinds, log_descriptor = -1;
static long target;
static atomic_long number;
static atomic_int armed, failing;

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static ssize_t real_write(int descriptor, const void *bytes, size_t size) {
    REAL(write);
    return real(descriptor, bytes, size);
}

void shim_arm(const char *directory, const char *log, int what, long at, int error, int kinds) {
    REAL(open);
    strncpy(root, directory, sizeof root - 1);
    root_length = strlen(root);
    action = what, target = at, error_number = error, counted_kinds = kinds;
    log_descriptor = real(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    atomic_store(&number, 0);
    atomic_store(&failing, 0);
    atomic_store(&armed, 1);
}

void shim_disarm(void) { atomic_store(&armed, 0); }

/* a full disk refuses what takes space, a read-only one what changes names, a broken one all */
static int is_refused(int kind) {
    switch (error_number) {
    case ENOSPC: case EDQUOT: return kind & SPACE;
    case EROFS: case EACCES: return kind & NAMES;
    default: return 1;
    }
}

/* Return what to do with a call: go on, half of it, or fail with an errno. */
static int decide(const char *call, const char *path, int kind, long size) {
    if (!atomic_load(&armed) || !(kind & counted_kinds)) return GO;
    if (strncmp(path, root, root_length) || (path[root_length] && path[root_length] != '/'))
        return GO;
    long now = atomic_fetch_add(&number, 1);
    int hit = now == target;
    if (action == COUNT || hit) {
        char line[PATH_MAX + 100];
        int length = snprintf(line, sizeof line, "%ld\t%s\t%d\t%ld\t%s\n", now, call, kind, size,
                              path[root_length] ? path + root_length + 1 : ".");
        real_write(log_descriptor, line, length);
    }
    if (hit) {
        if (action == KILL) kill(getpid(), SIGKILL), pause();
        if (action == STOP) kill(getpid(), SIGSTOP);
        if (action == FAIL_ALWAYS) atomic_store(&failing, 1);
        if (action == FAIL_ONCE) return error_number;
        if (action == SHORT || action == KILL_HALF) return HALF;
    }
    return atomic_load(&failing) && is_refused(kind) ? error_number : GO;
}

static void after_half(void) {
    if (action == KILL_HALF) kill(getpid(), SIGKILL), pause();
}

static const char *path_at(int directory, const char *name, char *path) {
    if (name[0] == '/') return name;
    if (directory == AT_FDCWD) {
        if (!getcwd(path, PATH_MAX)) path[0] = 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t length = readlink(link, path, PATH_MAX - 1);
        path[length < 0 ? 0 : length] = 0;
    }
    size_t length = strlen(path);
    snprintf(path + length, PATH_MAX - length, "/%s", name);
    return path;
}

static const char *path_of(int descriptor, char *path) {
    int saved = errno;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    errno = saved;
    return path;
}

static int is_writable(int descriptor) {
    int saved = errno, flags = fcntl(descriptor, F_GETFL);
    errno = saved;
    return flags >= 0 && (flags & O_ACCMODE) != O_RDONLY;
}

static int decide_open(int directory, const char *name, int flags) {
    char buffer[PATH_MAX];
    if (!atomic_load(&armed)) return GO;
    const char *path = path_at(directory, name, buffer);
    if ((flags & O_ACCMODE) == O_RDONLY && !(flags & (O_CREAT | O_TRUNC)))
        return decide("open", path, READS, 0);
    return decide("open for writing", path, NAMES | (flags & O_CREAT ? SPACE : 0), 0);
}

#define REFUSE(answer, failed) \
    do { \
        int decision = (answer); \
        if (decision > 0) { errno = decision; return failed; } \
    } while (0)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        REAL(name); \
        REFUSE(decide_open(AT_FDCWD, path, flags), -1); \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int directory, const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        REAL(name); \
        REFUSE(decide_open(directory, path, flags), -1); \
        return real(directory, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define CREAT(name) \
    int name(const char *path, mode_t mode) { \
        REAL(name); \
        REFUSE(decide_open(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC), -1); \
        return real(path, mode); \
    }
CREAT(creat)
CREAT(creat64)

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        REAL(name); \
        int writes = strpbrk(mode, "wa+") != NULL; \
        REFUSE(decide_open(AT_FDCWD, path, writes ? O_WRONLY | O_CREAT : O_RDONLY), NULL); \
        return real(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

/* descriptor, its path, its decision; half of a write is a short one, or the last one */
#define WRITES(call, kind, size) \
    char path[PATH_MAX]; \
    int decision = atomic_load(&armed) ? decide(call, path_of(descriptor, path), kind, size) : GO; \
    if (decision > 0) { errno = decision; return -1; }

ssize_t write(int descriptor, const void *bytes, size_t size) {
    REAL(write);
    WRITES("write", SPACE, size)
    ssize_t done = real(descriptor, bytes, decision == HALF ? size / 2 : size);
    if (decision == HALF) after_half();
    return done;
}

#define PWRITE(name, offset_type) \
    ssize_t name(int descriptor, const void *bytes, size_t size, offset_type offset) { \
        REAL(name); \
        WRITES("pwrite", SPACE, size) \
        ssize_t done = real(descriptor, bytes, decision == HALF ? size / 2 : size, offset); \
        if (decision == HALF) after_half(); \
        return done; \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    REAL(writev);
    WRITES("writev", SPACE, count ? (long)parts[0].iov_len : 0)
    if (decision == HALF) {
        ssize_t done = count ? real_write(descriptor, parts[0].iov_base, parts[0].iov_len / 2) : 0;
        after_half();
        return done;
    }
    return real(descriptor, parts, count);
}

ssize_t sendfile(int descriptor, int source, off_t *offset, size_t size) {
    REAL(sendfile);
    WRITES("sendfile", SPACE, size)
    return real(descriptor, source, offset, size);
}

ssize_t copy_file_range(int source, off64_t *from, int descriptor, off64_t *to, size_t size,
                        unsigned flags) {
    REAL(copy_file_range);
    WRITES("copy_file_range", SPACE, size)
    return real(source, from, descriptor, to, size, flags);
}

size_t fwrite(const void *bytes, size_t size, size_t count, FILE *file) {
    REAL(fwrite);
    char path[PATH_MAX];
    int decision = GO;
    if (atomic_load(&armed) && fileno(file) >= 0)
        decision = decide("fwrite", path_of(fileno(file), path), SPACE, size * count);
    if (decision == GO) return real(bytes, size, count, file);
    size_t done = decision == HALF ? real(bytes, size, count / 2, file) : 0;
    if (decision == HALF) {
        fflush(file);
        after_half();
    }
    errno = decision > 0 ? decision : ENOSPC; /* a short fwrite is an error */
    return done;
}

#define CHECKED(call, kind) \
    do { \
        char path[PATH_MAX]; \
        if (atomic_load(&armed)) REFUSE(decide(call, path_of(descriptor, path), kind, 0), -1); \
    } while (0)

#define READ_CALLS(name, call, parameters, arguments) \
    ssize_t name parameters { \
        REAL(name); \
        CHECKED(call, READS); \
        return real arguments; \
    }
READ_CALLS(read, "read", (int descriptor, void *bytes, size_t size), (descriptor, bytes, size))
READ_CALLS(pread, "pread", (int descriptor, void *bytes, size_t size, off_t at),
           (descriptor, bytes, size, at))
READ_CALLS(pread64, "pread", (int descriptor, void *bytes, size_t size, off64_t at),
           (descriptor, bytes, size, at))

int ftruncate(int descriptor, off_t size) {
    REAL(ftruncate); CHECKED("ftruncate", SPACE); return real(descriptor, size);
}
int ftruncate64(int descriptor, off64_t size) {
    REAL(ftruncate64); CHECKED("ftruncate", SPACE); return real(descriptor, size);
}
int fsync(int descriptor) {
    REAL(fsync); CHECKED("fsync", SPACE); return real(descriptor);
}
int fdatasync(int descriptor) {
    REAL(fdatasync); CHECKED("fdatasync", SPACE); return real(descriptor);
}
int fchmod(int descriptor, mode_t mode) {
    REAL(fchmod); CHECKED("fchmod", NAMES); return real(descriptor, mode);
}
int fallocate(int descriptor, int mode, off_t start, off_t size) {
    REAL(fallocate); CHECKED("fallocate", SPACE); return real(descriptor, mode, start, size);
}

/* these return the error instead of setting errno */
#define RESERVE(name, offset_type) \
    int name(int descriptor, offset_type start, offset_type size) { \
        REAL(name); \
        char path[PATH_MAX]; \
        int decision = GO; \
        if (atomic_load(&armed)) \
            decision = decide("posix_fallocate", path_of(descriptor, path), SPACE, size); \
        return decision > 0 ? decision : real(descriptor, start, size); \
    }
RESERVE(posix_fallocate, off_t)
RESERVE(posix_fallocate64, off64_t)

/* closing fails after the descriptor is gone, as on a network file system */
int close(int descriptor) {
    REAL(close);
    char path[PATH_MAX];
    int decision = GO;
    if (atomic_load(&armed) && is_writable(descriptor))
        decision = decide("close", path_of(descriptor, path), SPACE, 0);
    int failed = real(descriptor);
    if (decision > 0) { errno = decision; return -1; }
    return failed;
}
int fclose(FILE *file) {
    REAL(fclose);
    char path[PATH_MAX];
    int decision = GO, descriptor = fileno(file);
    if (atomic_load(&armed) && descriptor >= 0 && is_writable(descriptor))
        decision = decide("fclose", path_of(descriptor, path), SPACE, 0);
    int failed = real(file);
    if (decision > 0) { errno = decision; return EOF; }
    return failed;
}

#define NAMED(call, directory, name, kind) \
    do { \
        char buffer[PATH_MAX]; \
        if (atomic_load(&armed)) \
            REFUSE(decide(call, path_at(directory, name, buffer), kind, 0), -1); \
    } while (0)

int rename(const char *old, const char *new) {
    REAL(rename); NAMED("rename", AT_FDCWD, new, NAMES); return real(old, new);
}
int renameat(int from, const char *old, int to, const char *new) {
    REAL(renameat); NAMED("rename", to, new, NAMES); return real(from, old, to, new);
}
int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
    REAL(renameat2); NAMED("rename", to, new, NAMES); return real(from, old, to, new, flags);
}
int link(const char *old, const char *new) {
    REAL(link); NAMED("link", AT_FDCWD, new, NAMES | SPACE); return real(old, new);
}
int linkat(int from, const char *old, int to, const char *new, int flags) {
    REAL(linkat); NAMED("link", to, new, NAMES | SPACE); return real(from, old, to, new, flags);
}
int symlink(const char *content, const char *name) {
    REAL(symlink); NAMED("symlink", AT_FDCWD, name, NAMES | SPACE); return real(content, name);
}
int unlink(const char *name) {
    REAL(unlink); NAMED("unlink", AT_FDCWD, name, NAMES); return real(name);
}
int unlinkat(int directory, const char *name, int flags) {
    REAL(unlinkat);
    NAMED(flags & AT_REMOVEDIR ? "rmdir" : "unlink", directory, name, NAMES);
    return real(directory, name, flags);
}
int rmdir(const char *name) {
    REAL(rmdir); NAMED("rmdir", AT_FDCWD, name, NAMES); return real(name);
}
int mkdir(const char *name, mode_t mode) {
    REAL(mkdir); NAMED("mkdir", AT_FDCWD, name, NAMES | SPACE); return real(name, mode);
}
int mkdirat(int directory, const char *name, mode_t mode) {
    REAL(mkdirat); NAMED("mkdir", directory, name, NAMES | SPACE); return real(directory, name, mode);
}
int chmod(const char *name, mode_t mode) {
    REAL(chmod); NAMED("chmod", AT_FDCWD, name, NAMES); return real(name, mode);
}
