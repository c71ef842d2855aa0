/* Reader: bytes of a file into memory, past the page cache unless they are in it. Never maps the file: whoever
 * truncates it would kill us with SIGBUS. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* O_DIRECT wants offsets, lengths and addresses in multiples of the device's logical block, which is at most this. */
#define DIRECT_UNIT ((uint64_t)4096)

/* Small enough to be in the processor's cache still when it is copied, and on one 2 MiB OS page in staging memory: then
 * a request has few segments. Devices were fastest with several requests of this size in flight. */
#define DIRECT_STEP ((uint64_t)1 << 20)

struct tm_reader {
    int fd;
    int direct_fd;       /* -1: the file system has no O_DIRECT */
    atomic_bool direct;  /* cleared when it accepts O_DIRECT at open and refuses it at read */
};

int tm_reader_open(const char *path, tm_reader **reader) {
    tm_reader *made = malloc(sizeof *made);
    if (made == NULL) return -ENOMEM;
    int status = tm_prim_open_read(-1, path, &made->fd);
    if (status < 0) {
        free(made);
        return status;
    }
    if (tm_prim_reopen_read(made->fd, 1, &made->direct_fd) < 0) made->direct_fd = -1;
    atomic_init(&made->direct, made->direct_fd >= 0);
    *reader = made;
    return 0;
}

int tm_reader_fd(const tm_reader *reader) { return reader->fd; }

int tm_reader_is_direct(const tm_reader *reader) { return atomic_load(&reader->direct); }

/* OS pages of [offset, offset+length) that the page cache lacks. pre: length > 0, no overflow */
static int missing_pages(const tm_reader *reader, uint64_t offset, uint64_t length, uint64_t *missing) {
    uint64_t unit = tm_prim_os_page(), cached;
    int status = tm_prim_cached_pages(reader->fd, offset, length, &cached);
    if (status < 0) return status;
    uint64_t pages = (offset + length - 1) / unit - offset / unit + 1;
    *missing = pages - tm_min(cached, pages);
    return 0;
}

int tm_reader_cached(const tm_reader *reader, uint64_t offset, uint64_t length, uint64_t *bytes) {
    if (!tm_within(offset, length, TM_BYTES_MAX)) return TM_E_RANGE;
    *bytes = 0;
    if (length == 0) return 0;
    uint64_t missing;
    int status = missing_pages(reader, offset, length, &missing);
    if (status < 0) return status;
    /* All of `length` only where nothing is missing, although the first and last OS page count in part. */
    *bytes = length - tm_min(length, missing * tm_prim_os_page());
    return 0;
}

/* One run of adjoining parts. */
static int read_run(int fd, const tm_part *parts, unsigned count) {
    tm_iovec vector[TM_PRIM_IOVECS];
    uint64_t at = parts[0].offset;
    for (unsigned i = 0; i < count; i++) vector[i] = (tm_iovec){parts[i].destination, parts[i].length};
    for (unsigned first = 0; first < count;) {
        uint64_t got;
        int status = tm_prim_read_vector(fd, vector + first, count - first, at, &got);
        if (status < 0) return status;
        if (got == 0) return TM_E_SHORT;
        at += got;
        while (first < count && got >= vector[first].length) got -= vector[first++].length;
        if (first < count) vector[first] = (tm_iovec){(char *)vector[first].base + got, vector[first].length - got};
    }
    return 0;
}

static int read_buffered(int fd, const tm_part *parts, unsigned count) {
    for (unsigned first = 0; first < count;) {
        unsigned last = first + 1;
        while (last < count && last - first < TM_PRIM_IOVECS &&
               parts[last].offset == parts[last - 1].offset + parts[last - 1].length)
            last++;
        int status = read_run(fd, parts + first, last - first);
        if (status < 0) return status;
        first = last;
    }
    return 0;
}

/* Copy what [at, at+length) of the file, read to `from`, holds of the parts. *first: parts before it are complete. */
static void scatter(const tm_part *parts, unsigned count, unsigned *first, const char *from, uint64_t at,
                    uint64_t length) {
    for (unsigned i = *first; i < count && parts[i].offset < at + length; i++) {
        uint64_t end = parts[i].offset + parts[i].length;
        uint64_t low = tm_max(parts[i].offset, at), high = tm_min(end, at + length);
        if (high > low) memcpy((char *)parts[i].destination + (low - parts[i].offset), from + (low - at), high - low);
        if (end <= at + length) *first = i + 1;
    }
}

/* Step by step through the same memory, so that what was read is still in the processor's cache when it is copied. */
static int read_direct(int fd, const tm_part *parts, unsigned count, uint64_t start, uint64_t end, char *staging,
                       uint64_t step) {
    unsigned first = 0;
    uint64_t got;
    for (uint64_t at = start / DIRECT_UNIT * DIRECT_UNIT; at < end; at += got) {
        uint64_t wanted = tm_min(step, tm_round_up(end, DIRECT_UNIT) - at);
        int status = tm_prim_read(fd, staging, wanted, at, &got);
        if (status < 0) return status;
        /* A read that ends within a unit ended at the end of the file; going on from there would be -EINVAL. */
        if (got == 0 || (got % DIRECT_UNIT > 0 && at + got < end)) return TM_E_SHORT;
        scatter(parts, count, &first, staging, at, got);
    }
    return 0;
}

static int check_parts(const tm_part *parts, unsigned count) {
    uint64_t end = 0;
    for (unsigned i = 0; i < count; i++) {
        if (!tm_within(parts[i].offset, parts[i].length, TM_BYTES_MAX)) return TM_E_RANGE;
        if (parts[i].length == 0 || parts[i].offset < end) return -EINVAL;
        end = parts[i].offset + parts[i].length;
    }
    return 0;
}

int tm_reader_read(tm_reader *reader, const tm_part *parts, unsigned count, void *staging, uint64_t staging_bytes) {
    if (count == 0) return 0;
    int status = check_parts(parts, count);
    if (status < 0) return status;
    uint64_t start = parts[0].offset, end = parts[count - 1].offset + parts[count - 1].length;
    /* Checked even where staging is not needed: what a call may ask for must not depend on the page cache. */
    if ((uintptr_t)staging % DIRECT_UNIT > 0) return TM_E_ALIGN;
    if (staging_bytes == 0 || staging_bytes % DIRECT_UNIT > 0) return TM_E_RANGE;
    uint64_t missing = 1;
    if (atomic_load(&reader->direct)) (void)missing_pages(reader, start, end - start, &missing);
    if (!atomic_load(&reader->direct) || missing == 0) return read_buffered(reader->fd, parts, count);
    status = read_direct(reader->direct_fd, parts, count, start, end, staging,
                         tm_min(staging_bytes, DIRECT_STEP));
    if (status != -EINVAL) return status;
    atomic_store(&reader->direct, false);
    return read_buffered(reader->fd, parts, count);
}

void tm_reader_close(tm_reader *reader) {
    if (reader == NULL) return;
    tm_prim_close(reader->direct_fd);
    tm_prim_close(reader->fd);
    free(reader);
}

int tm_staging_alloc(uint64_t bytes, void **staging) {
    if (bytes == 0 || bytes > TM_BYTES_MAX) return TM_E_RANGE;
    bytes = tm_round_up(bytes, tm_prim_os_page());
    void *address;
    int status = tm_prim_reserve(bytes, &address);
    if (status < 0) return status;
    status = tm_prim_map_anonymous(address, bytes);
    if (status == 0) status = tm_prim_populate(address, bytes, -1, 0);
    if (status < 0) {
        tm_prim_unmap(address, bytes);
        return status;
    }
    *staging = address;
    return 0;
}

void tm_staging_free(void *staging, uint64_t bytes) {
    if (staging != NULL) tm_prim_unmap(staging, tm_round_up(bytes, tm_prim_os_page()));
}
