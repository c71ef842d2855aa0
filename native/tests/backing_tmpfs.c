/* A tmpfs of our own has the capacity asked for, gives 2 MiB OS pages, and needs no cleaning up when detached. */
#include <sys/statvfs.h>

#include "check.h"

static void check_mounted(void) {
    char path[64];
    close(scratch_open(path, "/tmp"));
    OK(tm_tmpfs_mount(path, 5 * PAGE));
    struct statvfs space;
    struct stat facts;
    OK(statvfs(path, &space));
    EXPECT(space.f_blocks * space.f_frsize, 5 * PAGE);
    TRUE(space.f_flag & ST_NOSUID);
    OK(stat(path, &facts));
    EXPECT(facts.st_mode & 0777, 0700);

    int dirfd = open(path, O_RDONLY | O_DIRECTORY);
    tm_segment *segment;
    OK(tm_segment_create(dirfd, "s", 3 * PAGE, 0, &segment));
    OK(tm_segment_prefault(segment, 0, 3 * PAGE, 1, 0));
    close(dirfd);
    OK(tm_tmpfs_resize(path, 9 * PAGE));
    OK(statvfs(path, &space));
    EXPECT(space.f_blocks * space.f_frsize, 9 * PAGE);
    EXPECT(tm_tmpfs_resize(path, PAGE), -EINVAL);

    OK(tm_tmpfs_unmount(path));
    memset(tm_segment_address(segment), 3, 3 * PAGE); /* mappings outlive it */
    tm_segment_close(segment);
    OK(rmdir(path));
}

/* Bytes of the mapping at `address` that 2 MiB OS pages map. */
static uint64_t mapped_huge(void *address) {
    char line[256], start[32];
    snprintf(start, sizeof start, "%lx-", (unsigned long)address);
    unsigned long kib = 0;
    FILE *smaps = fopen("/proc/self/smaps", "r");
    for (int ours = 0; fgets(line, sizeof line, smaps);) {
        if (strncmp(line, start, strlen(start)) == 0) ours = 1;
        if (ours && sscanf(line, "ShmemPmdMapped: %lu kB", &kib) == 1) break;
    }
    fclose(smaps);
    return kib * 1024;
}

int main(void) {
    int dirfd;
    EXPECT(tm_tmpfs_detached(0, &dirfd), TM_E_RANGE); /* tmpfs would take it for "no limit" */
    EXPECT(tm_tmpfs_detached(UINT64_MAX, &dirfd), TM_E_RANGE);
    int status = tm_tmpfs_detached(8 * PAGE, &dirfd);
    if (status < 0) {
        fprintf(stderr, "no tmpfs of our own: %s\n", tm_status_text(status));
        return SKIPPED;
    }
    tm_segment *segment;
    OK(tm_segment_create(dirfd, "s", 4 * PAGE, 0, &segment));
    OK(tm_segment_prefault(segment, 0, 4 * PAGE, 2, 0));
    EXPECT(mapped_huge(tm_segment_address(segment)), 4 * PAGE);
    tm_segment_close(segment);
    tm_segment *large;
    OK(tm_segment_create(dirfd, "large", 8 * PAGE, 0, &large));
    EXPECT(tm_segment_prefault(large, 0, 8 * PAGE, 2, 0), -ENOSPC); /* and no SIGBUS */
    tm_segment_close(large);
    close(dirfd);
    check_mounted();
    return 0;
}
