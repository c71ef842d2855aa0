/* A reader says when a file is too short, no file at all, or the request does not fit; it never hangs. */
#include "check.h"

#define FILE_BYTES 10000u
#define STAGING_BYTES ((uint64_t)64 << 10)

int main(void) {
    char path[64], file[80];
    int dirfd = scratch_open(path, "/var/tmp");
    static char bytes[FILE_BYTES], got[2 * STAGING_BYTES];
    tm_reader *reader;
    void *staging;

    OK(mkfifoat(dirfd, "fifo", 0600));
    snprintf(file, sizeof file, "%s/fifo", path);
    EXPECT(tm_reader_open(file, &reader), -EINVAL);
    EXPECT(tm_reader_open(path, &reader), -EINVAL);
    EXPECT(tm_reader_open("/dev/null", &reader), -EINVAL);
    snprintf(file, sizeof file, "%s/f", path);
    EXPECT(tm_reader_open(file, &reader), -ENOENT);

    int fd = openat(dirfd, "f", O_RDWR | O_CREAT | O_EXCL, 0600);
    EXPECT(write(fd, bytes, FILE_BYTES), FILE_BYTES);
    OK(tm_reader_open(file, &reader));
    struct stat facts;
    OK(fstat(tm_reader_fd(reader), &facts));
    EXPECT(facts.st_size, FILE_BYTES);
    OK(tm_staging_alloc(STAGING_BYTES, &staging));

    int direct = tm_reader_is_direct(reader);
    for (int cold = 0; cold < 2; cold++) {
        tm_part beyond = {FILE_BYTES - 1, 2, got}, behind = {1 << 20, 1, got};
        if (cold) {
            OK(fdatasync(fd));
            OK(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED));
        }
        EXPECT(tm_reader_read(reader, &beyond, 1, staging, STAGING_BYTES), TM_E_SHORT);
        EXPECT(tm_reader_read(reader, &behind, 1, staging, STAGING_BYTES), TM_E_SHORT);
    }

    EXPECT(tm_reader_is_direct(reader), direct); /* the end of the file is no reason to give up O_DIRECT */

    tm_part some = {0, 10, got}, far = {UINT64_MAX, 2, got}, empty = {0, 0, got};
    tm_part crossed[2] = {{100, 10, got}, {109, 10, got}};
    EXPECT(tm_reader_read(reader, &some, 1, staging, 0), TM_E_RANGE);
    EXPECT(tm_reader_read(reader, &some, 1, staging, 100), TM_E_RANGE);
    EXPECT(tm_reader_read(reader, &far, 1, staging, STAGING_BYTES), TM_E_RANGE);
    EXPECT(tm_reader_read(reader, &empty, 1, staging, STAGING_BYTES), -EINVAL);
    EXPECT(tm_reader_read(reader, crossed, 2, staging, STAGING_BYTES), -EINVAL);
    EXPECT(tm_reader_read(reader, crossed, 1, (char *)staging + 8, STAGING_BYTES - 8), TM_E_ALIGN);
    OK(tm_reader_read(reader, crossed, 0, staging, STAGING_BYTES));

    OK(ftruncate(fd, 50)); /* the file shrinks under an open reader: an error, not a signal */
    tm_part gone = {0, 4096, got};
    EXPECT(tm_reader_read(reader, &gone, 1, staging, STAGING_BYTES), TM_E_SHORT);
    tm_staging_free(staging, STAGING_BYTES);
    tm_reader_close(reader);
    close(fd);
    OK(unlinkat(dirfd, "f", 0));
    OK(unlinkat(dirfd, "fifo", 0));
    OK(rmdir(path));
    return 0;
}
