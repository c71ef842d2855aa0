/* tiermem native core: segments, mappings of them, the stock of prefaulted memory, file reading, copying.
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
 * -ENOSPC where the backing is full. */
int tm_segment_prefault(tm_segment *segment, uint64_t offset, uint64_t length, unsigned threads);
/* Make immutable: mapping read-only, file mode 0400, memfds sealed. Waits for prefaults; nobody may write meanwhile. */
int tm_segment_seal(tm_segment *segment);
/* A new read-only, close-on-exec descriptor of the file, to hand to a client. */
int tm_segment_share(const tm_segment *segment, int *fd);
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
int tm_range_reserve(uint64_t bytes, tm_range **range); /* 2 MiB aligned, whole pages, no memory behind it yet */
/* From the start of the file; offset in whole pages; TM_E_SHORT if the file is shorter than `length`. */
int tm_range_map(tm_range *range, uint64_t offset, int fd, uint64_t length, int mode); /* the caller keeps fd */
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

/* --- copy ------------------------------------------------------------------------------------------------------- */
int tm_copy(void *destination, const void *source, uint64_t bytes, unsigned threads);
/* ffi: end */
#endif
