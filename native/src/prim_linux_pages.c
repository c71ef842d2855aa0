/* Linux: the page tables of this process, read and emptied. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "prim.h"

#ifndef SYS_pidfd_open
#define SYS_pidfd_open 434
#endif
#ifndef SYS_process_madvise
#define SYS_process_madvise 440
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

/* <linux/fs.h> has these since Linux 6.7. */
struct scan_region {
    uint64_t start, end, categories;
};
struct scan_argument {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};
#define SCAN _IOWR('f', 16, struct scan_argument)
#define SCAN_FILE (1u << 2)
#define SCAN_PRESENT (1u << 3)
#define SCAN_SWAPPED (1u << 4)
#define SCAN_HUGE (1u << 6)

/* Entries of /proc/PID/pagemap, Documentation/admin-guide/mm/pagemap.rst. */
#define ENTRY_PRESENT (UINT64_C(1) << 63)
#define ENTRY_SWAPPED (UINT64_C(1) << 62)
#define ENTRY_FILE (UINT64_C(1) << 61)
#define ENTRIES 512

uint64_t tm_prim_process(void) { return (uint64_t)getpid(); }

static uint64_t read_clock(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint64_t tm_prim_now_ns(void) { return read_clock(CLOCK_MONOTONIC); }

uint64_t tm_prim_thread_ns(void) { return read_clock(CLOCK_THREAD_CPUTIME_ID); }

int tm_prim_pagemap_open(int *fd) {
    int opened = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (opened < 0) return -errno;
    *fd = opened;
    return 0;
}

int tm_prim_pagemap_scan(int fd, uint64_t start, uint64_t end, tm_os_run *runs, unsigned capacity, unsigned *count) {
    struct scan_region regions[TM_PRIM_RUNS];
    struct scan_argument scan = {
        .size = sizeof scan,
        .start = start,
        .end = end,
        .vec = (uintptr_t)regions,
        .vec_len = capacity,
        /* A file's page under migration is "swapped" for that moment. */
        .category_anyof_mask = SCAN_PRESENT | SCAN_SWAPPED,
        .return_mask = SCAN_FILE | SCAN_HUGE,
    };
    /* walk_end tells nothing: once 512 regions were found it stays behind (6.7 to 6.18 at least). */
    int found = ioctl(fd, SCAN, &scan);
    if (found < 0) return -errno;
    for (int i = 0; i < found; i++)
        runs[i] = (tm_os_run){regions[i].start, regions[i].end,
                              (regions[i].categories & SCAN_FILE ? TM_OS_FILE : 0) |
                                  (regions[i].categories & SCAN_HUGE ? TM_OS_HUGE : 0)};
    *count = (unsigned)found;
    return 0;
}

int tm_prim_pagemap_read(int fd, uint64_t start, uint64_t end, tm_os_run *runs, unsigned capacity, unsigned *count) {
    uint64_t entries[ENTRIES], step = tm_prim_os_page();
    unsigned found = 0;
    while (start < end) {
        uint64_t wanted = (end - start) / step;
        if (wanted > ENTRIES) wanted = ENTRIES;
        ssize_t got = pread(fd, entries, wanted * sizeof *entries, (off_t)(start / step * sizeof *entries));
        if (got < 0 && errno == EINTR) continue;
        if (got < (ssize_t)sizeof *entries) return got < 0 ? -errno : -EIO;
        for (uint64_t i = 0; i < (uint64_t)got / sizeof *entries; i++, start += step) {
            if (!(entries[i] & (ENTRY_PRESENT | ENTRY_SWAPPED))) continue;
            uint32_t facts = entries[i] & ENTRY_FILE ? TM_OS_FILE : 0;
            if (found > 0 && runs[found - 1].end == start && runs[found - 1].facts == facts) {
                runs[found - 1].end += step;
                continue;
            }
            if (found == capacity) goto full;
            runs[found++] = (tm_os_run){start, start + step, facts};
        }
    }
full:
    *count = found;
    return 0;
}

int tm_prim_process_open(int *fd) {
    int opened = (int)syscall(SYS_pidfd_open, getpid(), 0u);
    if (opened < 0) return -errno;
    *fd = opened;
    return 0;
}

int tm_prim_forget_vector(int process, const tm_iovec *vector, unsigned count, uint64_t *done) {
    struct iovec parts[TM_PRIM_FORGETS];
    for (unsigned i = 0; i < count; i++) parts[i] = (struct iovec){vector[i].base, vector[i].length};
    ssize_t bytes = syscall(SYS_process_madvise, process, parts, (unsigned long)count, MADV_DONTNEED, 0u);
    if (bytes < 0) return -errno;
    *done = (uint64_t)bytes;
    return 0;
}

int tm_prim_forget(void *address, uint64_t bytes) { return madvise(address, bytes, MADV_DONTNEED) < 0 ? -errno : 0; }

int tm_prim_populate_read(void *address, uint64_t bytes) {
    return madvise(address, bytes, MADV_POPULATE_READ) < 0 ? -errno : 0;
}

int tm_prim_dump(void *address, uint64_t bytes, int dumped) {
    return madvise(address, bytes, dumped ? MADV_DODUMP : MADV_DONTDUMP) < 0 ? -errno : 0;
}
