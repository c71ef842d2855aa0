/* Every page has its turn, what was touched since is told, dropped memory is left alone, and a run can be woken. */
#define _DEFAULT_SOURCE
#include <pthread.h>
#include <sys/mman.h>

#include "check.h"
#include "internal.h"

#define PAGES 24u
#define QUOTA 8u
#define ROOM 4096u

static volatile unsigned char sink;
static tm_sweep_window windows[256];
static uint32_t pages[ROOM];
static uint8_t touched[ROOM];
static tm_sweep_results results = {windows, pages, touched, 256, ROOM, 0, 0, 0, 0, 0, 0, 0};
static uint32_t order[PAGES];

static unsigned char *map_memory_file(void) {
    int fd;
    void *address;
    OK(tm_prim_memory_file("sweep", 0, &fd));
    OK(tm_prim_resize(fd, PAGES * PAGE));
    for (uint32_t page = 0; page < PAGES; page++) EXPECT(pwrite(fd, "x", 1, (off_t)(page * PAGE)), 1);
    OK(tm_prim_reserve(PAGES * PAGE, &address));
    OK(tm_prim_map(address, PAGES * PAGE, fd, 0, TM_PROTECT_READ));
    close(fd);
    return address;
}

static void touch_all(const unsigned char *bytes) {
    for (uint32_t page = 0; page < PAGES; page++) sink = bytes[page * PAGE];
}

static void run(tm_sweep *sweep, uint64_t quota) { OK(tm_sweep_run(sweep, quota, 1, 0, 1, &results)); }

static void check_rounds(tm_sweep *sweep, const unsigned char *bytes, const uint8_t *mask) {
    uint32_t turns[PAGES] = {0};
    touch_all(bytes);
    run(sweep, QUOTA);
    EXPECT(results.window_count, 0); /* what was touched before the first window is in none */
    for (uint32_t turn = 0; turn < 3 * PAGES / QUOTA; turn++) {
        bool odd = turn % 2;
        if (odd) touch_all(bytes);
        run(sweep, QUOTA);
        EXPECT(results.window_count, 1);
        TRUE(windows[0].begin_ns < windows[0].end_ns);
        for (uint32_t i = 0; i < results.page_count; i++) {
            turns[pages[i]]++;
            EXPECT(touched[i], odd);
            TRUE(i == 0 || pages[i] > pages[i - 1]);
        }
        EXPECT(results.faults > 0, odd);
    }
    for (uint32_t page = 0; page < PAGES; page++) EXPECT(turns[page], mask[page] & TM_SWEEP_PINNED ? 0 : 3);
}

static void check_private(tm_sweep *sweep, unsigned char *bytes, const uint8_t *mask) {
    unsigned char *own = bytes + 5 * PAGE + 8192;
    TRUE(mmap(own, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == own);
    memset(own, 7, 4096);
    for (uint32_t turn = 0; turn < 6; turn++) {
        touch_all(bytes);
        run(sweep, PAGES);
    }
    for (uint32_t i = 0; i < 4096; i++) EXPECT(own[i], 7);
    EXPECT(mask[5], TM_SWEEP_FOREIGN);
}

struct other {
    tm_sweep *sweep;
    unsigned char *bytes;
};

/* Drops the mapping in the middle of a run, and gives its addresses to somebody else. */
static void *drop_and_reuse(void *argument) {
    struct other *other = argument;
    usleep(20000);
    tm_sweep_drop(other->sweep, 1);
    OK(munmap(other->bytes, PAGES * PAGE));
    void *again = mmap(other->bytes, PAGES * PAGE, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    TRUE(again == other->bytes);
    for (uint32_t page = 0; page < PAGES; page++) other->bytes[page * PAGE] = 9;
    usleep(20000);
    tm_sweep_wake(other->sweep);
    return NULL;
}

static void check_drop_and_wake(tm_sweep *sweep, unsigned char *bytes) {
    struct other other = {sweep, bytes};
    pthread_t thread;
    OK(pthread_create(&thread, NULL, drop_and_reuse, &other));
    OK(tm_sweep_run(sweep, PAGES, 200, 1000000, 0, &results));
    OK(pthread_join(thread, NULL));
    TRUE(results.turns > 1 && results.turns < 200);
    for (uint32_t page = 0; page < PAGES; page++) EXPECT(bytes[page * PAGE], 9);
}

int main(void) {
    tm_pagemap *pagemap;
    tm_sweep *sweep;
    static uint8_t mask[PAGES];
    unsigned char *bytes = map_memory_file();
    for (uint32_t i = 0; i < PAGES; i++) order[i] = (i * 7 + 3) % PAGES;
    mask[11] = TM_SWEEP_PINNED;
    int status = tm_pagemap_open(&pagemap);
    if (status == -EACCES || status == -EPERM) {
        fprintf(stderr, "lacks the right to /proc/self/pagemap\n");
        return SKIPPED;
    }
    OK(status);
    OK(tm_sweep_open(pagemap, &sweep));
    run(sweep, QUOTA); /* of nothing */
    EXPECT(results.turns, 1);
    EXPECT(tm_sweep_add(sweep, 1, (uintptr_t)bytes + 4096, PAGES, order, mask), TM_E_ALIGN);
    EXPECT(tm_sweep_add(sweep, 1, (uintptr_t)bytes, PAGES - 1, order, mask), TM_E_RANGE);
    OK(tm_sweep_add(sweep, 1, (uintptr_t)bytes, PAGES, order, mask));
    tm_sweep_drop(sweep, 2);
    check_rounds(sweep, bytes, mask);
    check_private(sweep, bytes, mask);
    results.page_capacity = 3;
    EXPECT(tm_sweep_run(sweep, PAGES, 1, 0, 0, &results), -ENOBUFS);
    results.page_capacity = ROOM;
    check_drop_and_wake(sweep, bytes);
    tm_sweep_close(sweep);
    tm_pagemap_close(pagemap);
    return 0;
}
