/* Random parts arrive as pread would bring them: through the page cache, past it, and up to the file's last byte. */
#include "check.h"

#define FILE_BYTES ((uint64_t)3 * 1024 * 1024 + 777)
#define SPAN_BYTES ((uint64_t)1 << 20)
#define STAGING_BYTES ((uint64_t)48 << 10) /* many steps a span, most of which end inside a part */
#define PARTS 100u

static unsigned char expected[FILE_BYTES], got[FILE_BYTES + 64];

static void check_round(tm_reader *reader, void *staging, uint64_t *seed) {
    tm_part parts[PARTS] = {{0}};
    unsigned count = 0;
    uint64_t start = random_next(seed) % FILE_BYTES;
    uint64_t end = start + SPAN_BYTES < FILE_BYTES ? start + SPAN_BYTES : FILE_BYTES;
    memset(got, 0xEE, sizeof got);
    for (uint64_t at = start; at < end && count < PARTS;) {
        uint64_t length = 1 + random_next(seed) % (count % 3 ? 40000 : 9);
        if (length > end - at) length = end - at;
        parts[count++] = (tm_part){at, length, got + at};
        at += length + (random_next(seed) % 2 ? random_next(seed) % 9000 : 0); /* half of them adjoin */
    }
    OK(tm_reader_read(reader, parts, count, staging, STAGING_BYTES));
    for (unsigned i = 0; i < count; i++) {
        uint64_t after = parts[i].offset + parts[i].length;
        OK(memcmp(got + parts[i].offset, expected + parts[i].offset, parts[i].length));
        if (i + 1 == count || parts[i + 1].offset > after) EXPECT(got[after], 0xEE); /* not one byte beyond */
    }
}

static void drop_cache(int fd) {
    OK(fdatasync(fd));
    OK(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED));
}

/* One OS page in the cache is not two, however the question lies across them. */
static void check_count_of_one_page(tm_reader *reader, int fd) {
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), cached;
    drop_cache(fd);
    if (tm_reader_cached(reader, 0, FILE_BYTES, &cached) < 0 || cached >= page) return; /* memory is all there is */
    OK(posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM)); /* no reading ahead */
    EXPECT(pread(fd, got, page, (off_t)page * 8), page);
    OK(tm_reader_cached(reader, 8 * page, page, &cached));
    EXPECT(cached, page);
    OK(tm_reader_cached(reader, 8 * page + 100, page, &cached));
    EXPECT(cached, 0);
    OK(tm_reader_cached(reader, 8 * page + 100, 2 * page, &cached));
    EXPECT(cached, 0);
    OK(tm_reader_cached(reader, 7 * page, 3 * page, &cached));
    EXPECT(cached, page);
}

static void check_in(const char *parent) {
    char path[64], file[80];
    int dirfd = scratch_open(path, parent);
    uint64_t seed = 0x9E3779B97F4A7C15, cached;
    snprintf(file, sizeof file, "%s/f", path);
    int fd = openat(dirfd, "f", O_RDWR | O_CREAT | O_EXCL, 0600);
    EXPECT(write(fd, expected, FILE_BYTES), FILE_BYTES);
    tm_reader *reader;
    void *staging;
    OK(tm_reader_open(file, &reader));
    OK(tm_staging_alloc(STAGING_BYTES, &staging));
    fprintf(stderr, "%s: %s\n", parent, tm_reader_is_direct(reader) ? "direct" : "buffered");
    for (int i = 0; i < 40; i++) {
        if (i % 2) drop_cache(fd);
        check_round(reader, staging, &seed);
    }
    tm_part last = {FILE_BYTES - 5, 5, got}; /* a direct read ends short there */
    drop_cache(fd);
    OK(tm_reader_read(reader, &last, 1, staging, STAGING_BYTES));
    OK(memcmp(got, expected + FILE_BYTES - 5, 5));

    EXPECT(pread(fd, got, FILE_BYTES, 0), FILE_BYTES);
    int status = tm_reader_cached(reader, 100, FILE_BYTES - 100, &cached);
    if (status != -ENOSYS && status != -EPERM) {
        OK(status);
        EXPECT(cached, FILE_BYTES - 100);
        OK(tm_reader_cached(reader, FILE_BYTES - 10, 8192, &cached));
        TRUE(cached < 8192);
    }
    check_count_of_one_page(reader, fd);
    tm_staging_free(staging, STAGING_BYTES);
    tm_reader_close(reader);
    close(fd);
    OK(unlink(file));
    OK(rmdir(path));
}

int main(void) {
    random_fill(expected, FILE_BYTES, 42);
    check_in("/dev/shm");
    check_in("/var/tmp");
    return 0;
}
