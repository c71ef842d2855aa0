/* tiermem native core: segments, mappings of them, the stock of prefaulted memory, file reading, sampling, NUMA, copying.
 *
 * Owns memory and file descriptors behind opaque handles; has no global state. Knows no Python.
 * Functions return 0 or a negative status: -errno, or TM_E_*. Results leave through the last argument.
 * A handle may be used by several threads at once unless its section says otherwise; closing it may not race with a use.
 */
#ifndef TIERMEM_H
#define TIERMEM_H
#include <stdint.h>

/* ffi: begin */
#define TM_PAGE_BYTES 2097152 /* a page; "OS page" is the kernel's */

#define TM_E_SHORT (-2001)     /* the file ended before the bytes that were asked for */
#define TM_E_ALIGN (-2002)     /* an address, offset or length is not aligned as required */
#define TM_E_RANGE (-2003)     /* outside of the segment, range or staging memory */
#define TM_E_SEALED (-2004)    /* the segment is immutable */

const char *tm_version(void);
const char *tm_status_text(int status); /* never NULL; static or thread-local storage */

/* --- backing: file systems of our own that hold segment files ------------------------------------------------- */
int tm_tmpfs_mount(const char *path, uint64_t capacity);  /* huge=always, mode 0700; -EPERM without CAP_SYS_ADMIN */
int tm_tmpfs_resize(const char *path, uint64_t capacity); /* -EINVAL if more is in use or nothing is mounted */
int tm_tmpfs_unmount(const char *path);                   /* lazy: mappings outlive it */
int tm_tmpfs_detached(uint64_t capacity, int *dirfd);     /* the same, in no namespace; gone with the last user */

/* --- segment: one shared-memory file in whole pages, mapped by its pool ---------------------------------------- */
typedef struct tm_segment tm_segment;
#define TM_SEGMENT_HUGETLB 1 /* memfd on reserved 2 MiB OS pages; where there is a dirfd, it decides */

/* New file `name` in `dirfd` (O_EXCL, mode 0600), or a memfd where dirfd < 0; mapped writable. bytes: whole pages. */
int tm_segment_create(int dirfd, const char *name, uint64_t bytes, int flags, tm_segment **segment);
/* An existing file, read-only and sealed; TM_E_SHORT if it is not exactly `bytes` long, -EINVAL if it is no file. */
int tm_segment_open(int dirfd, const char *name, uint64_t bytes, tm_segment **segment);
void *tm_segment_address(const tm_segment *segment);
uint64_t tm_segment_bytes(const tm_segment *segment);
/* Allocate and map the pages that [offset, offset+length) lies in, with up to `threads` threads; what they hold stays.
 * nodes: bit n wants new memory on node n, and where these are full it comes from others; 0: as the kernel likes.
 * -ENOSPC where the backing is full; -ENODEV if none of the nodes has memory. */
int tm_segment_prefault(tm_segment *segment, uint64_t offset, uint64_t length, unsigned threads, uint64_t nodes);
/* Make immutable: mapping read-only, file mode 0400, memfds sealed. Waits for prefaults; nobody may write meanwhile. */
int tm_segment_seal(tm_segment *segment);
/* A new read-only, close-on-exec descriptor of the file, to hand to a client. */
int tm_segment_share(const tm_segment *segment, int *fd);
int tm_segment_fd(const tm_segment *segment); /* the segment keeps it */
/* A new descriptor as from share, but writable, for a client that fills the segment; TM_E_SEALED once it is sealed. */
int tm_segment_lend(tm_segment *segment, int *fd);
void tm_segment_close(tm_segment *segment); /* unmaps; unlinks nothing */

/* --- stock: prefaulted memory kept ahead of need ---------------------------------------------------------------- */
typedef struct tm_stock tm_stock;
int tm_stock_open(int dirfd, int flags, tm_stock **stock); /* an unlinked file of the backing; flags as above */
/* Adds whole pages and returns when they are there; a failure keeps the 32 MiB steps that were complete. */
int tm_stock_fill(tm_stock *stock, uint64_t bytes, unsigned threads);
/* Gives up to `bytes`, in whole pages, back to the kernel for reuse at once; waits for one step of a fill at most. */
int tm_stock_take(tm_stock *stock, uint64_t bytes, uint64_t *taken);
uint64_t tm_stock_bytes(tm_stock *stock);
void tm_stock_close(tm_stock *stock);

/* --- range: one aligned run of addresses in which segments are mapped side by side ----------------------------- */
typedef struct tm_range tm_range;
#define TM_MAP_SHARED 0 /* PROT_READ, MAP_SHARED */
#define TM_MAP_COW 1    /* PROT_READ|PROT_WRITE, MAP_PRIVATE: writes stay private */
#define TM_MAP_FILL 2   /* PROT_READ|PROT_WRITE, MAP_SHARED: writes are the segment's; needs a lent descriptor */
int tm_range_reserve(uint64_t bytes, tm_range **range); /* 2 MiB aligned, whole pages, no memory behind it yet */
/* From the start of the file; offset in whole pages; TM_E_SHORT if the file is shorter than `length`. */
int tm_range_map(tm_range *range, uint64_t offset, int fd, uint64_t length, int mode); /* the caller keeps fd */
int tm_range_protect(tm_range *range); /* PROT_READ for all of it: what was filled is shared from now on */
void *tm_range_address(const tm_range *range);
uint64_t tm_range_bytes(const tm_range *range);
void tm_range_release(tm_range *range);

/* --- reader: file to memory ------------------------------------------------------------------------------------- */
typedef struct tm_reader tm_reader;
typedef struct tm_part {
    uint64_t offset;      /* in the file */
    uint64_t length;
    void *destination;
} tm_part;
/* O_DIRECT beside a buffered descriptor where possible; -EINVAL unless the file is regular. */
int tm_reader_open(const char *path, tm_reader **reader);
int tm_reader_fd(const tm_reader *reader);                /* the buffered one, for fstat */
int tm_reader_is_direct(const tm_reader *reader);         /* 1 or 0 */
/* At least so many bytes are in the page cache; `length` only if all are. -ENOSYS before Linux 6.5. */
int tm_reader_cached(const tm_reader *reader, uint64_t offset, uint64_t length, uint64_t *bytes);
/* Read ascending, disjoint, non-empty parts. If the page cache holds all that they span, it is taken from there; otherwise
 * it is read past the cache, in steps through `staging` (aligned to 4 KiB and a multiple of it; one thread at a time). */
int tm_reader_read(tm_reader *reader, const tm_part *parts, unsigned count, void *staging, uint64_t staging_bytes);
void tm_reader_close(tm_reader *reader);
int tm_staging_alloc(uint64_t bytes, void **staging); /* 2 MiB aligned, prefaulted */
void tm_staging_free(void *staging, uint64_t bytes);

/* --- pagemap: which pages of this process's mappings are mapped, and unmapping them to see which come back ---------- */
typedef struct tm_pagemap tm_pagemap; /* of the process that opened it; of no use after a fork */
int tm_pagemap_open(tm_pagemap **pagemap); /* -EPERM, -EACCES, -ENOENT where /proc says so */
int tm_pagemap_scans(const tm_pagemap *pagemap); /* 1: PAGEMAP_SCAN (Linux 6.7); 0: /proc/self/pagemap is read */
#define TM_PAGE_PRESENT 0x03ff /* OS pages of it that are mapped: 0 to 512 */
#define TM_PAGE_PRIVATE 0x4000 /* an OS page of it is this process's own and no file's: zapping would lose it */
#define TM_PAGE_HUGE 0x8000    /* mapped by one 2 MiB entry */
/* state[i] of page number pages[i] (ascending) of the range at `address`, a multiple of a page. */
int tm_pagemap_look(tm_pagemap *pagemap, uint64_t address, const uint32_t *pages, uint32_t count, uint16_t *state);
/* Unmap these pages (ascending): bytes stay in the file, the next touch maps them again. Pages that are pinned in this
 * mapping (mlock) or not mapped at all are left: done[i] is 1 or 0. pre: looked at just now, none TM_PAGE_PRIVATE */
int tm_pagemap_zap(tm_pagemap *pagemap, uint64_t address, const uint32_t *pages, uint32_t count, uint8_t *done);
/* Keep every `group` pages of [0, pages) a mapping of their own in /proc/self/smaps, or with 0 let the kernel join them. */
int tm_pagemap_split(tm_pagemap *pagemap, uint64_t address, uint32_t pages, uint32_t group);
void tm_pagemap_close(tm_pagemap *pagemap);

/* --- sweep: pages of many mappings take turns at being unmapped ----------------------------------------------------- */
typedef struct tm_sweep tm_sweep; /* one thread runs it at a time; others may add, drop and wake meanwhile */
#define TM_SWEEP_PINNED 1  /* a device reads the page; set by the caller */
#define TM_SWEEP_FOREIGN 2 /* it holds memory of this process alone */
#define TM_SWEEP_HELD 4    /* it is locked, and cannot be unmapped; tried again every round */
typedef struct tm_sweep_window { /* of one mapping: pages[first] to pages[first + count - 1] were looked for */
    uint64_t key, begin_ns, end_ns; /* CLOCK_MONOTONIC */
    uint32_t first, count;
} tm_sweep_window;
typedef struct tm_sweep_results { /* arrays and capacities are the caller's, the rest is written by a run */
    tm_sweep_window *windows;
    uint32_t *pages;
    uint8_t *touched;
    uint32_t window_capacity, page_capacity, window_count, page_count, turns;
    uint64_t due;      /* pages that had their turn, summed over turns */
    uint64_t faults;   /* that the client took because pages had been unmapped */
    uint64_t turn_ns;  /* CPU time of looking and unmapping */
    uint64_t fault_ns; /* what one fault costs; 0: not timed */
} tm_sweep_results;
int tm_sweep_open(tm_pagemap *pagemap, tm_sweep **sweep); /* the caller keeps the pagemap */
/* Pages have their turns in the `order` of their numbers, each of which is in it once; those with a bit in `mask` have none.
 * Both arrays stay the caller's until the mapping is dropped, which must be before its memory is unmapped. */
int tm_sweep_add(tm_sweep *sweep, uint64_t key, uint64_t address, uint32_t pages, const uint32_t *order, uint8_t *mask);
void tm_sweep_drop(tm_sweep *sweep, uint64_t key); /* waits for a turn in progress; unknown keys are none */
/* Up to `turns` turns, `epoch_ns` apart, of about `quota` pages each; the first is at once. Ends early when it is woken or
 * when the results are full; -ENOBUFS if they have no room for one turn. */
int tm_sweep_run(tm_sweep *sweep, uint64_t quota, uint32_t turns, uint64_t epoch_ns, int timed, tm_sweep_results *results);
void tm_sweep_wake(tm_sweep *sweep);  /* a run, now or the next one, ends after its turn */
void tm_sweep_close(tm_sweep *sweep);

/* --- ring: samples that the kernel takes, perf_event_open(2) --------------------------------------------------------- */
typedef struct tm_ring tm_ring; /* one event and its buffer; one thread reads it at a time */
#define TM_EVENT_EXCLUDE_KERNEL 1
#define TM_EVENT_INHERIT 2     /* threads and processes that start later; needs a cpu */
#define TM_EVENT_SIDEBAND 4    /* records of mappings, threads, exec and exits too */
#define TM_EVENT_ON_EXEC 8     /* enabled by the next exec */
#define TM_EVENT_MONOTONIC 16  /* TIME is CLOCK_MONOTONIC; costs PEBS its multi-record mode */
#define TM_EVENT_DISABLED 32   /* until tm_ring_enable */
typedef struct tm_event {
    uint32_t type;
    uint32_t flags;
    uint64_t config, config1, config2, config3;
    uint64_t period;
    uint64_t sample_type;
    uint32_t precise; /* 0 to 3 */
    uint32_t breakpoint_type; /* HW_BREAKPOINT_*, with address in config1 and length in config2 */
} tm_event;
/* `bytes`: power of two of at least one OS page; `aux_bytes`: the same for devices with an AUX area, else 0. `leader`: the
 * ring whose group it joins, or NULL. -ENOENT, -EOPNOTSUPP: no such event here; -EACCES, -EPERM: no right; -EBUSY, -ENOSPC:
 * somebody else's; -EINVAL. */
int tm_ring_open(const tm_event *event, int32_t pid, int32_t cpu, const tm_ring *leader, uint64_t bytes,
                 uint64_t aux_bytes, tm_ring **ring);
int tm_ring_fd(const tm_ring *ring); /* for epoll: readable at a quarter full */
int tm_ring_enable(tm_ring *ring);
int tm_ring_disable(tm_ring *ring);
/* The event's id, its count so far and the samples that found no room; hands over what the hardware still buffers. */
int tm_ring_count(tm_ring *ring, uint64_t *id, uint64_t *value, uint64_t *lost);
/* Moves whole records out, oldest first; *got is 0 when it is empty. TM_E_SHORT if the next one exceeds `capacity`. */
int tm_ring_read(tm_ring *ring, void *records, uint64_t capacity, uint64_t *got);
int tm_ring_read_aux(tm_ring *ring, void *bytes, uint64_t capacity, uint64_t *got);
void tm_ring_close(tm_ring *ring);

/* --- samples: records of a ring or of a perf.data file -> rows ------------------------------------------------------- */
typedef struct tm_sample {
    uint64_t ip, time, addr, phys_addr, id, stream_id, period, data_src, transaction, cgroup, data_page_size, code_page_size;
    uint32_t pid, tid, cpu;
    uint32_t weight;      /* all of WEIGHT's low half, or var1 of WEIGHT_STRUCT */
    uint16_t weight2;     /* var2: instruction latency */
    uint16_t weight3;     /* var3: retire latency, p stage */
    uint16_t misc;        /* of the record's header */
    uint16_t event;       /* index of its layout */
} tm_sample;
typedef struct tm_layout { /* of perf_event_attr */
    uint64_t sample_type, read_format, branch_sample_type, sample_regs_user, sample_regs_intr;
} tm_layout;
typedef struct tm_record { /* one that is no sample */
    uint64_t offset;
    uint32_t type;
    uint16_t misc, size;
} tm_record;
typedef struct tm_decoder tm_decoder; /* immutable once open */
/* Sample k of event ids[k] has layout layouts[of[k]]; with one layout, ids may be empty; with several, a sample of
 * an unknown id comes out as a tm_record. -EINVAL for bits of newer kernels, and where layouts differ in where the id
 * is. */
int tm_decoder_open(const tm_layout *layouts, uint32_t layout_count, const uint64_t *ids, const uint16_t *of,
                    uint32_t id_count, tm_decoder **decoder);
/* Decodes records from [bytes, bytes+length) until the end, or until either output is full. *used: bytes of whole records
 * done; what is left is an incomplete one. TM_E_RANGE: record sizes or counts are nonsense; *used says where. */
int tm_decoder_decode(const tm_decoder *decoder, const void *bytes, uint64_t length, tm_sample *samples,
                      uint64_t sample_capacity, tm_record *records, uint64_t record_capacity, uint64_t *used,
                      uint64_t *sample_count, uint64_t *record_count);
void tm_decoder_close(tm_decoder *decoder);

/* --- spe: packets of Arm's Statistical Profiling Extension -> rows ---------------------------------------------------- */
/* A row per record that has a data address; `time` is the record's timestamp in ticks, `weight` the total latency, `weight2`
 * the issue and `weight3` the translation latency, `data_src` the raw source, `transaction` the events, `id` the operation
 * type. *used: bytes of whole records done. Bytes that are no packets are skipped and counted in *bad. */
int tm_spe_decode(const void *bytes, uint64_t length, tm_sample *samples, uint64_t capacity, uint64_t *used, uint64_t *count,
                  uint64_t *bad);

/* --- numa: on which node the pages of a segment lie, and moving them --------------------------------------------- */
typedef struct tm_numa tm_numa; /* of the process that opened it; of no use after a fork */
#define TM_NODE_ABSENT (-1) /* not in memory */
#define TM_NODE_MIXED (-2)  /* its OS pages lie on several nodes */
#define TM_MOVE_ALL 1       /* pages that other processes map, too; needs CAP_SYS_NICE */
#define TM_MOVED 0
#define TM_WAS_THERE 1
int tm_numa_open(tm_numa **numa); /* as tm_pagemap_open */
/* Asks the kernel for nodes[i] of page first + i; maps those that are in memory, allocates none. -ENOSYS: a kernel
 * without NUMA. */
int tm_numa_where(tm_numa *numa, const tm_segment *segment, uint32_t first, uint32_t count, int16_t *nodes);
/* results[i] of page number pages[i] (ascending), by where it lies afterwards: TM_MOVED, TM_WAS_THERE, or why not all of
 * it could be moved: -EBUSY (in use, or pinned by a device), -EACCES (others map it: TM_MOVE_ALL), -ENOMEM (the node is
 * full), -ENOENT (not in memory), or another -errno of the kernel. A node without room for 2 MiB in one piece has the
 * kernel split pages into OS pages: at most 16, then the others are left as they are.
 * If the call itself fails, results are undefined and some pages may have moved: -EPERM, no CAP_SYS_NICE; -ENODEV, no such
 * node with memory; -EACCES, not in this process's cpuset; -ENOSYS. Nothing to move is no failure. */
int tm_numa_move(tm_numa *numa, const tm_segment *segment, const uint32_t *pages, uint32_t count, unsigned node, int flags,
                 int32_t *results);
void tm_numa_close(tm_numa *numa);

/* --- probe: how fast a node's memory is ------------------------------------------------------------------------------ */
typedef struct tm_probe tm_probe; /* one thread uses it at a time */
/* Private memory, rounded up to pages, on 2 MiB OS pages where the kernel has them; nodes as in tm_segment_prefault. */
int tm_probe_open(uint64_t bytes, uint64_t nodes, tm_probe **probe);
int tm_probe_where(const tm_probe *probe, uint64_t *nodes); /* bit n: a part of it lies on node n, of the first 64 */
/* Time of `loads` loads, each of which needs the one before, in random order; goes on where the last call stopped. */
int tm_probe_latency(tm_probe *probe, uint64_t loads, uint64_t *ns);
int tm_probe_bandwidth(tm_probe *probe, unsigned threads, uint64_t *ns); /* time of reading all of it once */
void tm_probe_close(tm_probe *probe);

/* --- copy ------------------------------------------------------------------------------------------------------- */
int tm_copy(void *destination, const void *source, uint64_t bytes, unsigned threads);
/* ffi: end */
#endif
