/* An opened segment holds what its creator wrote, is sealed, and must be exactly as long as expected. */
#include "check.h"

int main(void) {
    char path[64];
    int dirfd = scratch_open(path, "/dev/shm");
    tm_segment *made, *opened;
    OK(tm_segment_create(dirfd, "s", PAGE, 0, &made));
    memset(tm_segment_address(made), 0xA5, PAGE);
    tm_segment_close(made);

    EXPECT(tm_segment_open(dirfd, "s", 2 * PAGE, &opened), TM_E_SHORT);
    EXPECT(tm_segment_open(dirfd, "absent", PAGE, &opened), -ENOENT);
    OK(symlinkat("s", dirfd, "link"));
    EXPECT(tm_segment_open(dirfd, "link", PAGE, &opened), -ELOOP);
    OK(mkfifoat(dirfd, "fifo", 0600));
    EXPECT(tm_segment_open(dirfd, "fifo", PAGE, &opened), -EINVAL);

    OK(tm_segment_open(dirfd, "s", PAGE, &opened));
    unsigned char *bytes = tm_segment_address(opened);
    EXPECT(bytes[0], 0xA5);
    EXPECT(bytes[PAGE - 1], 0xA5);
    EXPECT(tm_segment_prefault(opened, 0, PAGE, 1, 0), TM_E_SEALED);
    tm_segment_close(opened);
    OK(unlinkat(dirfd, "s", 0));
    OK(unlinkat(dirfd, "link", 0));
    OK(unlinkat(dirfd, "fifo", 0));
    OK(rmdir(path));
    return 0;
}
