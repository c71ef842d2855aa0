/* A shared descriptor is read-only and close-on-exec; it outlives the segment and shows its bytes. A lent one is
 * writable, until the segment is sealed. */
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "check.h"

#define REFUSED 9

static void end_refused(int number) { _exit(number == SIGSEGV ? REFUSED : 1); }

static void check_lent(int dirfd) {
    tm_segment *segment;
    tm_range *range;
    int fd, refused = -1;
    OK(tm_segment_create(dirfd, "lent", PAGE, 0, &segment));
    OK(tm_segment_lend(segment, &fd));
    TRUE(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    OK(tm_range_reserve(PAGE, &range));
    OK(tm_range_map(range, 0, fd, PAGE, TM_MAP_FILL));
    close(fd);
    unsigned char *bytes = tm_range_address(range);
    bytes[7] = 42;
    EXPECT(((unsigned char *)tm_segment_address(segment))[7], 42);
    OK(tm_range_protect(range));
    OK(tm_segment_seal(segment));
    EXPECT(tm_segment_lend(segment, &refused), TM_E_SEALED);
    EXPECT(refused, -1);
    pid_t child = fork();
    if (child == 0) {
        signal(SIGSEGV, end_refused);
        bytes[7] = 43;
        _exit(0);
    }
    int status;
    EXPECT(waitpid(child, &status, 0), child);
    EXPECT(WEXITSTATUS(status), REFUSED);
    EXPECT(bytes[7], 42);
    tm_range_release(range);
    tm_segment_close(segment);
    OK(unlinkat(dirfd, "lent", 0));
}

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
    check_lent(dirfd);
    OK(rmdir(path));
    return 0;
}
