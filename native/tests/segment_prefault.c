/* Prefaulting allocates exactly the pages asked for, keeps what is in them, and stays within bounds. */
#include "check.h"
#include "prim.h"

static uint64_t allocated(tm_segment *segment) {
    int fd;
    struct stat facts;
    OK(tm_segment_share(segment, &fd));
    OK(fstat(fd, &facts));
    close(fd);
    return (uint64_t)facts.st_blocks * 512;
}

static void populates_by_touch(void) {
    int fd;
    void *address;
    struct stat facts;
    OK(tm_prim_memory_file("old", 0, &fd));
    OK(tm_prim_resize(fd, 2 * PAGE));
    OK(tm_prim_reserve(2 * PAGE, &address));
    OK(tm_prim_map(address, 2 * PAGE, fd, 0, TM_PROTECT_WRITE));
    unsigned char *bytes = address;
    bytes[4096] = 17;
    OK(tm_prim_populate_by_touch(bytes, 2 * PAGE, fd, 0));
    OK(fstat(fd, &facts));
    EXPECT(facts.st_blocks * 512, 2 * PAGE);
    EXPECT(bytes[4096], 17);
    tm_prim_unmap(address, 2 * PAGE);
    tm_prim_close(fd);
}

static void populates_what_was_asked(void) {
    tm_segment *segment;
    OK(tm_segment_create(-1, "s", 40 * PAGE, 0, &segment));
    unsigned char *bytes = tm_segment_address(segment);
    EXPECT(allocated(segment), 0);
    OK(tm_segment_prefault(segment, 3 * PAGE + 5, 1, 1, 0)); /* any byte stands for its page */
    EXPECT(allocated(segment), PAGE);
    bytes[3 * PAGE + 7] = 42;
    OK(tm_segment_prefault(segment, 0, 40 * PAGE, 3, 0));
    EXPECT(allocated(segment), 40 * PAGE);
    EXPECT(bytes[3 * PAGE + 7], 42);

    OK(tm_segment_prefault(segment, 40 * PAGE, 0, 1, 0));
    OK(tm_segment_prefault(segment, 0, PAGE, 0, 0));
    EXPECT(tm_segment_prefault(segment, 40 * PAGE, 1, 1, 0), TM_E_RANGE);
    EXPECT(tm_segment_prefault(segment, UINT64_MAX, 2, 1, 0), TM_E_RANGE);
    tm_segment_close(segment);
}

int main(void) {
    populates_what_was_asked();
    populates_by_touch(); /* what kernels without MADV_POPULATE_WRITE get */
    return 0;
}
