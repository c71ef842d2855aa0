/* A stock holds what it was filled with, gives what it has, and its pages come back to the backing. */
#include <pthread.h>
#include <sys/statvfs.h>

#include "check.h"

static void counts_whole_pages(void) {
    tm_stock *stock;
    uint64_t taken = 1;
    OK(tm_stock_open(-1, 0, &stock));
    OK(tm_stock_take(stock, PAGE, &taken));
    EXPECT(taken, 0);
    OK(tm_stock_fill(stock, 20 * PAGE - 1, 2));
    EXPECT(tm_stock_bytes(stock), 20 * PAGE);
    OK(tm_stock_take(stock, 3 * PAGE - 1, &taken));
    EXPECT(taken, 3 * PAGE);
    EXPECT(tm_stock_bytes(stock), 17 * PAGE);
    OK(tm_stock_fill(stock, PAGE, 1));
    OK(tm_stock_take(stock, 100 * PAGE, &taken));
    EXPECT(taken, 18 * PAGE);
    EXPECT(tm_stock_bytes(stock), 0);
    EXPECT(tm_stock_fill(stock, UINT64_MAX, 1), TM_E_RANGE);
    EXPECT(tm_stock_take(stock, UINT64_MAX, &taken), TM_E_RANGE);
    tm_stock_close(stock);
}

static void *fill_sixty_four(void *stock) {
    OK(tm_stock_fill(stock, 64 * PAGE, 1));
    return NULL;
}

/* With a backing of our own (dirfd >= 0) the pages that are gone from it must be those that the stock counts. */
static void fills_and_takes_at_once(int dirfd) {
    tm_stock *stock;
    pthread_t fillers[2];
    struct statvfs space;
    uint64_t total = 0, taken;
    OK(tm_stock_open(dirfd, 0, &stock));
    for (int i = 0; i < 2; i++) OK(pthread_create(&fillers[i], NULL, fill_sixty_four, stock));
    for (int i = 0; i < 20; i++, total += taken) OK(tm_stock_take(stock, 2 * PAGE, &taken));
    for (int i = 0; i < 2; i++) OK(pthread_join(fillers[i], NULL));
    EXPECT(tm_stock_bytes(stock), 128 * PAGE - total);
    if (dirfd >= 0) {
        OK(fstatvfs(dirfd, &space));
        EXPECT((space.f_blocks - space.f_bfree) * space.f_frsize, 128 * PAGE - total);
    }
    tm_stock_close(stock);
}

/* In a backing that is as large as the stock, a segment has room only once pages were taken from it. */
static void hands_its_pages_over(int dirfd) {
    uint64_t taken;
    tm_stock *stock;
    tm_segment *segment;
    OK(tm_stock_open(dirfd, 0, &stock));
    OK(tm_stock_fill(stock, 20 * PAGE, 2));
    EXPECT(tm_stock_fill(stock, 8 * PAGE, 2), -ENOSPC);
    EXPECT(tm_stock_bytes(stock), 20 * PAGE); /* the failed step gave back what it had */
    OK(tm_segment_create(dirfd, "rest", 4 * PAGE, 0, &segment));
    OK(tm_segment_prefault(segment, 0, 4 * PAGE, 1, 0));
    tm_segment_close(segment);
    OK(unlinkat(dirfd, "rest", 0));
    OK(tm_segment_create(dirfd, "s", 16 * PAGE, 0, &segment));
    EXPECT(tm_segment_prefault(segment, 0, 16 * PAGE, 2, 0), -ENOSPC);
    OK(tm_stock_take(stock, 16 * PAGE, &taken));
    OK(tm_segment_prefault(segment, 0, 16 * PAGE, 2, 0));
    tm_segment_close(segment);
    tm_stock_close(stock);
}

int main(void) {
    counts_whole_pages();
    fills_and_takes_at_once(-1);
    int small, large;
    int status = tm_tmpfs_detached(24 * PAGE, &small);
    if (status < 0) {
        fprintf(stderr, "no tmpfs of our own: %s\n", tm_status_text(status));
        return SKIPPED;
    }
    hands_its_pages_over(small);
    OK(tm_tmpfs_detached(160 * PAGE, &large));
    fills_and_takes_at_once(large);
    close(small);
    close(large);
    return 0;
}
