/* Segments lie side by side in a range; a copy-on-write mapping keeps its writes; bounds are checked. */
#include "check.h"

static int segment_of(unsigned char value, uint64_t pages, tm_segment **segment) {
    int fd;
    OK(tm_segment_create(-1, "s", pages * PAGE, 0, segment));
    memset(tm_segment_address(*segment), value, pages * PAGE);
    OK(tm_segment_share(*segment, &fd));
    return fd;
}

int main(void) {
    tm_segment *one, *two;
    int first = segment_of(1, 1, &one), second = segment_of(2, 2, &two);
    tm_range *range, *copy;
    EXPECT(tm_range_reserve(0, &range), TM_E_RANGE);
    EXPECT(tm_range_reserve(UINT64_MAX, &range), TM_E_RANGE);
    OK(tm_range_reserve(3 * PAGE - 5, &range));
    EXPECT(tm_range_bytes(range), 3 * PAGE);
    unsigned char *bytes = tm_range_address(range);
    EXPECT((uintptr_t)bytes % PAGE, 0);

    OK(tm_range_map(range, 0, first, PAGE, TM_MAP_SHARED));
    OK(tm_range_map(range, PAGE, second, 2 * PAGE, TM_MAP_SHARED));
    EXPECT(bytes[PAGE - 1], 1);
    EXPECT(bytes[PAGE], 2);
    EXPECT(bytes[3 * PAGE - 1], 2);
    *(unsigned char *)tm_segment_address(one) = 9;
    EXPECT(bytes[0], 9);

    EXPECT(tm_range_map(range, PAGE, second, 2 * PAGE + 1, TM_MAP_SHARED), TM_E_RANGE);
    EXPECT(tm_range_map(range, 2 * PAGE, second, 2 * PAGE, TM_MAP_SHARED), TM_E_RANGE);
    EXPECT(tm_range_map(range, UINT64_MAX / PAGE * PAGE, second, 2 * PAGE, TM_MAP_SHARED), TM_E_RANGE);
    EXPECT(tm_range_map(range, 0, second, 0, TM_MAP_SHARED), TM_E_RANGE);
    EXPECT(tm_range_map(range, 4096, first, PAGE, TM_MAP_SHARED), TM_E_ALIGN);
    EXPECT(tm_range_map(range, 0, first, 2 * PAGE, TM_MAP_SHARED), TM_E_SHORT);
    EXPECT(tm_range_map(range, 0, first, PAGE, 3), -EINVAL);
    EXPECT(tm_range_map(range, 0, first, PAGE, TM_MAP_FILL), -EACCES); /* shared descriptors are for reading */
    EXPECT(tm_range_map(range, 0, -1, PAGE, TM_MAP_SHARED), -EBADF);
    EXPECT(bytes[0], 9); /* a refused mapping leaves what was there */

    OK(tm_range_reserve(PAGE, &copy));
    OK(tm_range_map(copy, 0, first, PAGE, TM_MAP_COW));
    unsigned char *own = tm_range_address(copy);
    own[0] = 77;
    EXPECT(bytes[0], 9);
    EXPECT(*(unsigned char *)tm_segment_address(one), 9);
    EXPECT(own[1], 1);
    close(first);
    close(second);
    tm_segment_close(one);
    tm_segment_close(two);
    EXPECT(bytes[PAGE], 2); /* mappings outlive descriptors and the pool's own mapping */
    tm_range_release(copy);
    tm_range_release(range);
    return 0;
}
