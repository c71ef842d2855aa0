/* Linux: the only file that includes platform headers. */
#define _GNU_SOURCE
#include "prim.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <linux/magic.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "tiermem.h"

/* Numbers of the kernel's interface that older C libraries lack; the same on every architecture that we build for. */
#ifndef SYS_fsopen
#define SYS_fsopen 430
#define SYS_fsconfig 431
#define SYS_fsmount 432
#endif
#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21U << 26)
#endif
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif
#define FSOPEN_CLOEXEC_FLAG 1u
#define FSMOUNT_CLOEXEC_FLAG 1u
#define FSCONFIG_STRING 1u
#define FSCONFIG_CREATE 6u
#define MOUNT_NOSUID_NODEV_NOEXEC (2u | 4u | 8u)

/* The value of an expression, repeated while a signal interrupts it. */
#define RETRY(expression)                                  \
    __extension__({                                        \
        __typeof__(expression) retried_;                   \
        do {                                               \
            retried_ = (expression);                       \
        } while (retried_ == -1 && errno == EINTR);        \
        retried_;                                          \
    })

static int status_of(long returned) { return returned < 0 ? -errno : 0; }

static int descriptor(int returned, int *fd) {
    if (returned < 0) return -errno;
    *fd = returned;
    return 0;
}

uint64_t tm_prim_os_page(void) { return (uint64_t)sysconf(_SC_PAGESIZE); }

/* --- files ------------------------------------------------------------------------------------------------------ */

int tm_prim_create(int dirfd, const char *name, int *fd) {
    return descriptor(RETRY(openat(dirfd, name, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600)), fd);
}

int tm_prim_create_unlinked(int dirfd, int *fd) {
    return descriptor(RETRY(openat(dirfd, ".", O_RDWR | O_TMPFILE | O_EXCL | O_CLOEXEC, 0600)), fd);
}

int tm_prim_memory_file(const char *label, int hugetlb, int *fd) {
    unsigned flags = MFD_CLOEXEC | MFD_ALLOW_SEALING | (hugetlb ? MFD_HUGETLB | MFD_HUGE_2MB : 0);
    int created = memfd_create(label, flags);
    if (created < 0) return -errno;
    /* Memory files are born 0777: anyone who sees /proc/PID/fd could write to them. */
    if (fchmod(created, 0600) < 0) {
        int status = -errno;
        tm_prim_close(created);
        return status;
    }
    *fd = created;
    return 0;
}

int tm_prim_open_read(int dirfd, const char *path, int *fd) {
    /* O_NONBLOCK: a FIFO without a writer would hang here; regular files ignore it. */
    int flags = O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC | (dirfd < 0 ? 0 : O_NOFOLLOW);
    int opened = RETRY(openat(dirfd < 0 ? AT_FDCWD : dirfd, path, flags));
    if (opened < 0) return -errno;
    struct stat facts;
    int status = status_of(fstat(opened, &facts));
    if (status == 0 && !S_ISREG(facts.st_mode)) status = -EINVAL;
    if (status < 0) {
        tm_prim_close(opened);
        return status;
    }
    *fd = opened;
    return 0;
}

int tm_prim_reopen_read(int fd, int direct, int *again) {
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return descriptor(RETRY(open(path, O_RDONLY | O_CLOEXEC | (direct ? O_DIRECT : 0))), again);
}

int tm_prim_reopen_write(int fd, int *again) {
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return descriptor(RETRY(open(path, O_RDWR | O_CLOEXEC)), again);
}

int tm_prim_unlink(int dirfd, const char *name) { return status_of(unlinkat(dirfd, name, 0)); }

int tm_prim_resize(int fd, uint64_t bytes) { return status_of(RETRY(ftruncate(fd, (off_t)bytes))); }

int tm_prim_size(int fd, uint64_t *bytes) {
    struct stat facts;
    if (fstat(fd, &facts) < 0) return -errno;
    *bytes = (uint64_t)facts.st_size;
    return 0;
}

int tm_prim_is_hugetlb(int fd) {
    struct statfs facts;
    return RETRY(fstatfs(fd, &facts)) == 0 && facts.f_type == HUGETLBFS_MAGIC;
}

int tm_prim_make_immutable(int fd) {
    if (fchmod(fd, 0400) < 0) return -errno;
    /* Only memory files know seals; on other files and older kernels the mode is all there is. */
    (void)fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL);
    return 0;
}

void tm_prim_close(int fd) {
    if (fd >= 0) (void)close(fd); /* not repeated on EINTR: Linux has released the number by then */
}

int tm_prim_read(int fd, void *destination, uint64_t length, uint64_t offset, uint64_t *got) {
    ssize_t count = RETRY(pread(fd, destination, length, (off_t)offset));
    if (count < 0) return -errno;
    *got = (uint64_t)count;
    return 0;
}

int tm_prim_read_vector(int fd, const tm_iovec *vector, unsigned count, uint64_t offset, uint64_t *got) {
    struct iovec parts[TM_PRIM_IOVECS];
    for (unsigned i = 0; i < count; i++) parts[i] = (struct iovec){vector[i].base, vector[i].length};
    ssize_t read = RETRY(preadv(fd, parts, (int)count, (off_t)offset));
    if (read < 0) return -errno;
    *got = (uint64_t)read;
    return 0;
}

int tm_prim_cached_pages(int fd, uint64_t offset, uint64_t length, uint64_t *pages) {
    struct {
        uint64_t offset, length;
    } range = {offset, length};
    struct {
        uint64_t cache, dirty, writeback, evicted, recently_evicted;
    } facts = {0};
    if (syscall(SYS_cachestat, fd, &range, &facts, 0u) < 0) return -errno;
    *pages = facts.cache;
    return 0;
}

/* --- memory ----------------------------------------------------------------------------------------------------- */

int tm_prim_reserve(uint64_t bytes, void **address) {
    /* The kernel aligns to OS pages only: take a page more than asked, and give both ends back. */
    uint64_t total = bytes + TM_PAGE_BYTES;
    char *start = mmap(NULL, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) return -errno;
    uint64_t before = -(uintptr_t)start % TM_PAGE_BYTES;
    if (before > 0) (void)munmap(start, before);
    (void)munmap(start + before + bytes, TM_PAGE_BYTES - before);
    *address = start + before;
    return 0;
}

int tm_prim_map(void *address, uint64_t bytes, int fd, uint64_t offset, enum tm_protection protection) {
    int access = protection == TM_PROTECT_READ ? PROT_READ : PROT_READ | PROT_WRITE;
    int flags = MAP_FIXED | (protection == TM_PROTECT_COW ? MAP_PRIVATE | MAP_NORESERVE : MAP_SHARED);
    return mmap(address, bytes, access, flags, fd, (off_t)offset) == MAP_FAILED ? -errno : 0;
}

int tm_prim_map_anonymous(void *address, uint64_t bytes) {
    void *mapped = mmap(address, bytes, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return -errno;
    (void)madvise(address, bytes, MADV_HUGEPAGE); /* a wish; kernels without 2 MiB OS pages refuse */
    return 0;
}

void tm_prim_unmap(void *address, uint64_t bytes) { (void)munmap(address, bytes); }

int tm_prim_protect_read(void *address, uint64_t bytes) { return status_of(mprotect(address, bytes, PROT_READ)); }

int tm_prim_populate(void *address, uint64_t bytes, int fd, uint64_t offset) {
    if (RETRY(madvise(address, bytes, MADV_POPULATE_WRITE)) == 0) return 0;
    if (errno == EINVAL) return tm_prim_populate_by_touch(address, bytes, fd, offset);
    /* EFAULT is how madvise reports that a touch would raise SIGBUS: the file system has no page left. */
    return errno == EFAULT ? -ENOSPC : -errno;
}

int tm_prim_populate_by_touch(void *address, uint64_t bytes, int fd, uint64_t offset) {
    /* Allocate first: touching a page that a full file system cannot give raises SIGBUS. */
    if (fd >= 0 && RETRY(fallocate(fd, 0, (off_t)offset, (off_t)bytes)) < 0) return -errno;
    uint64_t step = tm_prim_os_page();
    for (uint64_t at = 0; at < bytes; at += step)
        (void)__atomic_fetch_or((unsigned char *)address + at, 0, __ATOMIC_RELAXED); /* keeps what others wrote */
    return 0;
}

/* --- file systems ----------------------------------------------------------------------------------------------- */

static int mount_tmpfs(const char *path, uint64_t capacity, unsigned long flags) {
    char options[80];
    snprintf(options, sizeof options, "size=%" PRIu64 ",huge=always,mode=0700", capacity);
    return status_of(mount("tiermem", path, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC | flags, options));
}

int tm_prim_tmpfs_mount(const char *path, uint64_t capacity) { return mount_tmpfs(path, capacity, 0); }

int tm_prim_tmpfs_resize(const char *path, uint64_t capacity) { return mount_tmpfs(path, capacity, MS_REMOUNT); }

int tm_prim_tmpfs_unmount(const char *path) { return status_of(umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW)); }

static int configure(int context, const char *key, const char *value) {
    return status_of(syscall(SYS_fsconfig, context, value ? FSCONFIG_STRING : FSCONFIG_CREATE, key, value, 0));
}

int tm_prim_tmpfs_detached(uint64_t capacity, int *dirfd) {
    char size[24];
    snprintf(size, sizeof size, "%" PRIu64, capacity);
    int context = (int)syscall(SYS_fsopen, "tmpfs", FSOPEN_CLOEXEC_FLAG);
    if (context < 0) return -errno;
    int status = configure(context, "size", size);
    if (status == 0) status = configure(context, "huge", "always");
    if (status == 0) status = configure(context, "mode", "0700");
    if (status == 0) status = configure(context, NULL, NULL);
    if (status == 0)
        status = descriptor((int)syscall(SYS_fsmount, context, FSMOUNT_CLOEXEC_FLAG, MOUNT_NOSUID_NODEV_NOEXEC), dirfd);
    tm_prim_close(context);
    return status;
}
