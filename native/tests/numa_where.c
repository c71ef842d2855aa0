/* Where pages lie: what the kernel says of each, without allocating any; numbers out of order or range are refused. */
#include <sys/wait.h>

#include "check.h"
#include "internal.h"

#define PAGES 300 /* more than go to the kernel at once */

static uint64_t allocated(tm_segment *segment) {
    int fd;
    struct stat facts;
    OK(tm_segment_share(segment, &fd));
    OK(fstat(fd, &facts));
    close(fd);
    return (uint64_t)facts.st_blocks * 512;
}

static void check_memory(tm_numa *numa) {
    static int16_t nodes[PAGES];
    tm_segment *segment;
    OK(tm_segment_create(-1, "s", PAGES * PAGE, 0, &segment));
    OK(tm_numa_where(numa, segment, 0, PAGES, nodes));
    for (uint32_t i = 0; i < PAGES; i++) EXPECT(nodes[i], TM_NODE_ABSENT);
    EXPECT(allocated(segment), 0);
    for (uint32_t i = 7; i < PAGES; i += 31) OK(tm_segment_prefault(segment, i * PAGE, i % 2 ? PAGE : 1, 1, 0));
    ((volatile unsigned char *)tm_segment_address(segment))[9 * PAGE + 5 * 4096] = 1; /* one OS page of it */
    uint64_t before = allocated(segment);
    OK(tm_numa_where(numa, segment, 3, PAGES - 3, nodes));
    for (uint32_t i = 3; i < PAGES; i++) EXPECT(nodes[i - 3], i % 31 == 7 || i == 9 ? 0 : TM_NODE_ABSENT);
    EXPECT(allocated(segment), before);

    EXPECT(tm_numa_where(numa, segment, PAGES, 1, nodes), TM_E_RANGE);
    EXPECT(tm_numa_where(numa, segment, UINT32_MAX, UINT32_MAX, nodes), TM_E_RANGE);
    OK(tm_numa_where(numa, segment, PAGES, 0, nodes));
    tm_segment_close(segment);
}

/* A file that another process filled: in memory, and not in our page tables. */
static void check_adopted(tm_numa *numa, int dirfd) {
    int16_t nodes[4];
    tm_segment *made, *opened;
    OK(tm_segment_create(dirfd, "s", 4 * PAGE, 0, &made));
    OK(tm_segment_prefault(made, PAGE, 2 * PAGE, 1, 0));
    OK(tm_segment_open(dirfd, "s", 4 * PAGE, &opened));
    uint64_t before = allocated(made);
    OK(tm_numa_where(numa, opened, 0, 4, nodes));
    EXPECT(nodes[0], TM_NODE_ABSENT);
    EXPECT(nodes[1], 0);
    EXPECT(nodes[2], 0);
    EXPECT(nodes[3], TM_NODE_ABSENT);
    EXPECT(allocated(made), before);
    tm_segment_close(made);
    tm_segment_close(opened);
    OK(unlinkat(dirfd, "s", 0));
}

static void check_child(tm_numa *numa) {
    int16_t node;
    tm_segment *segment;
    OK(tm_segment_create(-1, "s", PAGE, 0, &segment));
    pid_t child = fork();
    if (child == 0) _exit(tm_numa_where(numa, segment, 0, 1, &node) == -ESRCH ? 0 : 1);
    int status;
    EXPECT(waitpid(child, &status, 0), child);
    EXPECT(status, 0);
    tm_segment_close(segment);
}

int main(void) {
    tm_numa *numa;
    OK(tm_numa_open(&numa));
    void *self = &numa;
    int node;
    if (tm_prim_nodes(&self, 1, &node) == -ENOSYS) return SKIPPED;
    check_memory(numa);
    char path[64];
    int dirfd = scratch_open(path, "/dev/shm");
    check_adopted(numa, dirfd);
    close(dirfd);
    OK(rmdir(path));
    if (tm_tmpfs_detached(16 * PAGE, &dirfd) == 0) { /* on 2 MiB OS pages */
        check_adopted(numa, dirfd);
        close(dirfd);
    }
    check_child(numa);
    tm_numa_close(numa);
    tm_numa_close(NULL);
    return 0;
}
