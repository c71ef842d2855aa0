/* A segment is a file of whole pages, mapped writable at an aligned address, zero at first. */
#include "check.h"

static void refuses_bad_sizes_and_names(int dirfd) {
    tm_segment *none = NULL;
    EXPECT(tm_segment_create(dirfd, "s", 0, 0, &none), TM_E_RANGE);
    EXPECT(tm_segment_create(dirfd, "s", PAGE - 1, 0, &none), TM_E_ALIGN);
    EXPECT(tm_segment_create(dirfd, "s", UINT64_MAX / PAGE * PAGE, 0, &none), TM_E_RANGE);
    EXPECT(tm_segment_create(dirfd, "../s", PAGE, 0, &none), -EINVAL);
    EXPECT(tm_segment_create(dirfd, "s", PAGE, 2, &none), -EINVAL);
    TRUE(tm_segment_create(dirfd, "s", UINT64_C(1) << 59, 0, &none) < 0); /* no address space is that large */
    TRUE(none == NULL);
    EXPECT(faccessat(dirfd, "s", F_OK, 0), -1);
}

static void is_aligned_zeroed_and_its_own(int dirfd) {
    tm_segment *segment, *again;
    OK(tm_segment_create(dirfd, "s", 2 * PAGE, 0, &segment));
    unsigned char *bytes = tm_segment_address(segment);
    EXPECT((uintptr_t)bytes % PAGE, 0);
    EXPECT(tm_segment_bytes(segment), 2 * PAGE);
    EXPECT(bytes[0] | bytes[2 * PAGE - 1], 0);
    struct stat facts;
    if (dirfd >= 0) {
        OK(fstatat(dirfd, "s", &facts, 0));
        EXPECT(facts.st_size, 2 * PAGE);
        EXPECT(facts.st_mode & 0777, 0600);
        EXPECT(tm_segment_create(dirfd, "s", PAGE, 0, &again), -EEXIST);
        OK(fstatat(dirfd, "s", &facts, 0)); /* the refused one must not have unlinked it */
    }
    tm_segment_close(segment);
    if (dirfd >= 0) OK(unlinkat(dirfd, "s", 0));
}

int main(void) {
    char path[64];
    int dirfd = scratch_open(path, "/dev/shm");
    refuses_bad_sizes_and_names(dirfd);
    is_aligned_zeroed_and_its_own(dirfd);
    is_aligned_zeroed_and_its_own(-1);
    OK(rmdir(path));
    return 0;
}
