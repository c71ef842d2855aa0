/* Moving, as far as one node shows it: what is there stays, what is nowhere is told, bad calls change nothing. */
#include "check.h"
#include "internal.h"

#define PAGES 300 /* more than go to the kernel at once */

int main(void) {
    static uint32_t pages[PAGES];
    static int32_t results[PAGES];
    tm_numa *numa;
    tm_segment *segment;
    OK(tm_numa_open(&numa));
    void *self = &numa;
    int node;
    if (tm_prim_nodes(&self, 1, &node) == -ENOSYS) return SKIPPED;
    OK(tm_segment_create(-1, "s", PAGES * PAGE, 0, &segment));
    for (uint32_t i = 0; i < PAGES; i++) pages[i] = i;
    for (uint32_t i = 0; i < PAGES; i += 20) OK(tm_segment_prefault(segment, i * PAGE, PAGE, 1, 0));
    OK(tm_numa_move(numa, segment, pages, PAGES, 0, 0, results));
    for (uint32_t i = 0; i < PAGES; i++) EXPECT(results[i], i % 20 == 0 ? TM_WAS_THERE : -ENOENT);

    EXPECT(tm_numa_move(numa, segment, pages, PAGES, 1023, 0, results), -ENODEV);
    EXPECT(tm_numa_move(numa, segment, pages, PAGES, UINT32_MAX, 0, results), -ENODEV);
    OK(tm_numa_move(numa, segment, pages + 1, 19, 1023, 0, results)); /* nothing to move */
    OK(tm_numa_move(numa, segment, pages, 0, 1023, 0, results));
    EXPECT(tm_numa_move(numa, segment, pages, PAGES, 0, 2, results), -EINVAL);
    pages[2] = 1;
    EXPECT(tm_numa_move(numa, segment, pages, PAGES, 0, 0, results), -EINVAL);
    pages[2] = PAGES;
    EXPECT(tm_numa_move(numa, segment, pages, 3, 0, 0, results), TM_E_RANGE);
    tm_segment_close(segment);
    tm_numa_close(numa);
    return 0;
}
