/* A shared descriptor is read-only and close-on-exec; it outlives the segment and shows its bytes. */
#include <sys/mman.h>

#include "check.h"

int main(void) {
    char path[64];
    int dirfd = scratch_open(path, "/dev/shm"), fd;
    tm_segment *segment;
    OK(tm_segment_create(dirfd, "s", PAGE, 0, &segment));
    memset(tm_segment_address(segment), 0x5A, PAGE);
    OK(unlinkat(dirfd, "s", 0));
    OK(tm_segment_share(segment, &fd)); /* found by its descriptor: the name is gone */
    tm_segment_close(segment);

    EXPECT(fcntl(fd, F_GETFL) & O_ACCMODE, O_RDONLY);
    TRUE(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    EXPECT(write(fd, "x", 1), -1);
    EXPECT(ftruncate(fd, 0), -1);
    TRUE(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED);
    unsigned char *mapped = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
    TRUE(mapped != MAP_FAILED);
    EXPECT(mapped[PAGE - 1], 0x5A);
    EXPECT(mprotect(mapped, PAGE, PROT_READ | PROT_WRITE), -1);
    munmap(mapped, PAGE);
    close(fd);
    OK(rmdir(path));
    return 0;
}
