/* Every call into the operating system, behind functions that a port to another one would rewrite.
 *
 * Owns no state. Functions return 0 or -errno; results leave through the last argument. Interrupted calls are repeated.
 * `pre:` lines are the caller's duty and are not checked here.
 */
#ifndef TIERMEM_PRIM_H
#define TIERMEM_PRIM_H
#include <stdint.h>

typedef struct tm_iovec {
    void *base;
    uint64_t length;
} tm_iovec;

enum tm_protection { TM_PROTECT_READ, TM_PROTECT_WRITE, TM_PROTECT_COW };

uint64_t tm_prim_os_page(void);

/* --- files ------------------------------------------------------------------------------------------------------ */
int tm_prim_create(int dirfd, const char *name, int *fd); /* O_EXCL, mode 0600 */
int tm_prim_create_unlinked(int dirfd, int *fd);          /* has no name, and cannot get one */
int tm_prim_memory_file(const char *label, int hugetlb, int *fd);
int tm_prim_open_read(int dirfd, const char *path, int *fd); /* dirfd < 0: path as it stands; -EINVAL unless regular */
int tm_prim_reopen_read(int fd, int direct, int *again);     /* the same file, whatever its name is by now */
int tm_prim_reopen_write(int fd, int *again);                /* the same, for reading and writing */
int tm_prim_unlink(int dirfd, const char *name);
int tm_prim_resize(int fd, uint64_t bytes);
int tm_prim_size(int fd, uint64_t *bytes);
int tm_prim_is_hugetlb(int fd); /* 1 or 0 */
int tm_prim_make_immutable(int fd); /* mode 0400; a memory file refuses writes, resizing and writable mappings too */
void tm_prim_close(int fd);

/* Read up to `length` bytes; *got is 0 at the end of the file. */
int tm_prim_read(int fd, void *destination, uint64_t length, uint64_t offset, uint64_t *got);
/* pre: 1 <= count <= TM_PRIM_IOVECS */
#define TM_PRIM_IOVECS 64
int tm_prim_read_vector(int fd, const tm_iovec *vector, unsigned count, uint64_t offset, uint64_t *got);
/* OS pages of [offset, offset+length) that the page cache holds; -ENOSYS before Linux 6.5. pre: length > 0 */
int tm_prim_cached_pages(int fd, uint64_t offset, uint64_t length, uint64_t *pages);

/* --- memory ----------------------------------------------------------------------------------------------------- */
/* Addresses at a multiple of TM_PAGE_BYTES, with nothing behind them. pre: whole pages */
int tm_prim_reserve(uint64_t bytes, void **address);
/* pre: [address, address+bytes) lies in a reservation; address and offset are whole pages */
int tm_prim_map(void *address, uint64_t bytes, int fd, uint64_t offset, enum tm_protection protection);
/* Private memory on 2 MiB OS pages where the kernel has them. pre: as for tm_prim_map */
int tm_prim_map_anonymous(void *address, uint64_t bytes);
void tm_prim_unmap(void *address, uint64_t bytes);
int tm_prim_protect_read(void *address, uint64_t bytes);
/* Allocate and map; the contents stay. -ENOSPC where the file system is full. fd < 0: anonymous.
 * pre: mapped writable, from `offset` of fd; whole OS pages */
int tm_prim_populate(void *address, uint64_t bytes, int fd, uint64_t offset);
/* The same for kernels before 5.14. */
int tm_prim_populate_by_touch(void *address, uint64_t bytes, int fd, uint64_t offset);

/* --- page tables ------------------------------------------------------------------------------------------------ */
typedef struct tm_os_run { /* alike, neighbouring OS pages that the page tables have an entry for */
    uint64_t start, end;
    uint32_t facts;
} tm_os_run;
#define TM_OS_FILE 1u /* of a file; without it, memory of this process alone */
#define TM_OS_HUGE 2u /* mapped by one 2 MiB entry */
uint64_t tm_prim_process(void);
uint64_t tm_prim_now_ns(void);
uint64_t tm_prim_thread_ns(void); /* CPU time of the calling thread */
int tm_prim_pagemap_open(int *fd);
/* Runs of [start, end), ascending. Fewer than `capacity`: that is all; else ask again from the last one's end.
 * -ENOTTY before Linux 6.7. pre: OS pages; capacity <= TM_PRIM_RUNS */
#define TM_PRIM_RUNS 512
int tm_prim_pagemap_scan(int fd, uint64_t start, uint64_t end, tm_os_run *runs, unsigned capacity, unsigned *count);
/* The same for all kernels; does not tell TM_OS_HUGE. */
int tm_prim_pagemap_read(int fd, uint64_t start, uint64_t end, tm_os_run *runs, unsigned capacity, unsigned *count);
int tm_prim_process_open(int *fd); /* this process, for tm_prim_forget_vector */
/* Drop the entries of these parts, in order; *done: the bytes of those before the first that failed. Where none was
 * done: -EINVAL for locked memory, and on kernels (before 6.13) that have no such call for a process's own memory.
 * pre: 1 <= count <= TM_PRIM_FORGETS; below 2 GiB in all, where the kernel cuts */
#define TM_PRIM_FORGETS 512
int tm_prim_forget_vector(int process, const tm_iovec *vector, unsigned count, uint64_t *done);
int tm_prim_forget(void *address, uint64_t bytes); /* -EINVAL: locked; -ENOMEM: not mapped, or not all */
int tm_prim_populate_read(void *address, uint64_t bytes); /* map what is there; -EINVAL before Linux 5.14 */
int tm_prim_dump(void *address, uint64_t bytes, int dumped); /* in core dumps or not: neighbours that differ stay apart */

/* --- nodes ------------------------------------------------------------------------------------------------------ */
/* Node that the OS page at each address lies on, or -errno: -ENOENT, -EFAULT where our page tables have none. */
int tm_prim_nodes(void *const *addresses, unsigned count, int *nodes);
/* move_pages(2) for this process. 0; -ENOMEM: the target is full; or > 0: one of a list of neighbours in `addresses`
 * was not moved, and those after that list were not tried. Lists end where an address's own status was written; that of
 * the members of a list that failed, and of all that were not tried, is left as it was. */
int tm_prim_move(void *const *addresses, unsigned count, const int *wanted, int all, int *status);
/* Which OS pages of a file that is mapped here are in memory, mapped or not: bit 0 of a byte each. Of a hugetlbfs file
 * that is not complete, none. */
int tm_prim_resident(void *address, uint64_t bytes, int fd, unsigned char *resident);
#define TM_PRIM_NODES 1024ul
typedef struct tm_prim_policy { /* where a thread's new memory comes from */
    int mode, known;
    unsigned long nodes[TM_PRIM_NODES / 8 / sizeof(long)];
} tm_prim_policy;
/* The calling thread, and threads that it starts, take new memory from these nodes first. -ENODEV: none of them has
 * memory; 0 is no wish, and a kernel without NUMA ignores it. */
int tm_prim_prefer(uint64_t nodes, tm_prim_policy *before);
void tm_prim_prefer_as(const tm_prim_policy *before);

/* --- perf ------------------------------------------------------------------------------------------------------- */
struct tm_event;
/* A ring that the kernel fills. Positions only grow; byte `p` of the stream is at data[p % bytes]. */
typedef struct tm_buffer {
    unsigned char *data;
    uint64_t bytes;       /* a power of two */
    const uint64_t *head; /* the kernel's: what is before it is written; load-acquire */
    uint64_t *tail;       /* ours: what is before it may be overwritten; store-release */
} tm_buffer;
typedef struct tm_prim_perf {
    int fd;
    void *mapping, *aux_mapping;
    tm_buffer records, aux; /* aux.bytes is 0 where there is none */
} tm_prim_perf;
/* Disabled. pre: bytes is a power of two of at least an OS page, and so is aux_bytes, unless it is 0 */
int tm_prim_perf_open(const struct tm_event *event, int32_t pid, int32_t cpu, int leader, uint64_t bytes,
                      uint64_t aux_bytes, tm_prim_perf *perf);
int tm_prim_perf_enable(int fd);
int tm_prim_perf_disable(int fd);
/* *lost is UINT64_MAX where the kernel does not count it (before 6.0). */
int tm_prim_perf_count(int fd, uint64_t *id, uint64_t *value, uint64_t *lost);
void tm_prim_perf_close(tm_prim_perf *perf);

/* --- file systems ----------------------------------------------------------------------------------------------- */
int tm_prim_tmpfs_mount(const char *path, uint64_t capacity);
int tm_prim_tmpfs_resize(const char *path, uint64_t capacity);
int tm_prim_tmpfs_unmount(const char *path);
int tm_prim_tmpfs_detached(uint64_t capacity, int *dirfd);
#endif
