/* Unmapped pages come back with their bytes; locked and unmapped ones are told; no limit of one call cuts it short. */
#define _DEFAULT_SOURCE
#include <sys/mman.h>
#include <sys/syscall.h>

#include "check.h"
#include "internal.h"

#define MANY 1300 /* pages: more than the kernel takes in one call */

static volatile unsigned char sink;

static unsigned char *map_memory_file(uint64_t pages) {
    int fd;
    void *address;
    OK(tm_prim_memory_file("zap", 0, &fd));
    OK(tm_prim_resize(fd, pages * PAGE));
    for (uint64_t page = 0; page < pages; page++) {
        unsigned char number = (unsigned char)(page + 1);
        EXPECT(pwrite(fd, &number, 1, (off_t)(page * PAGE)), 1);
    }
    OK(tm_prim_reserve(pages * PAGE, &address));
    OK(tm_prim_map(address, pages * PAGE, fd, 0, TM_PROTECT_READ));
    close(fd);
    return address;
}

static void check_all(tm_pagemap *pagemap, uint32_t step) {
    static uint32_t pages[MANY];
    static uint16_t state[MANY];
    static uint8_t done[MANY];
    unsigned char *bytes = map_memory_file(MANY);
    uint32_t count = 0;
    for (uint32_t page = 0; page < MANY; page++) sink = bytes[page * PAGE];
    for (uint32_t page = 0; page < MANY; page += step) pages[count++] = page;
    OK(tm_pagemap_zap(pagemap, (uintptr_t)bytes, pages, count, done));
    for (uint32_t i = 0; i < count; i++) EXPECT(done[i], 1);
    for (uint32_t page = 0; page < MANY; page++) pages[page] = page;
    OK(tm_pagemap_look(pagemap, (uintptr_t)bytes, pages, MANY, state));
    for (uint32_t page = 0; page < MANY; page++) EXPECT(state[page] > 0, page % step != 0);
    for (uint32_t page = 0; page < MANY; page++) EXPECT(bytes[page * PAGE], (unsigned char)(page + 1));
    OK(munmap(bytes, MANY * PAGE));
}

/* Sanitizers make mlock(3) do nothing. */
static long lock_os_page(void *address) { return syscall(SYS_mlock, address, 4096); }

/* Pages 2 and 5 of 8 neighbours are locked, page 7 is not mapped at all. */
static void check_left(tm_pagemap *pagemap) {
    static const uint32_t pages[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    static const uint8_t expected[8] = {1, 1, 0, 1, 1, 0, 1, 0};
    uint8_t done[8];
    uint16_t state[8];
    unsigned char *bytes = map_memory_file(8);
    for (uint32_t page = 0; page < 8; page++) sink = bytes[page * PAGE];
    if (lock_os_page(bytes + 2 * PAGE) != 0 || lock_os_page(bytes + 5 * PAGE) != 0) {
        fprintf(stderr, "no right to lock 8 KiB (ulimit -l)\n");
        exit(SKIPPED);
    }
    OK(munmap(bytes + 7 * PAGE, PAGE));
    for (int again = 0; again < 2; again++) {
        OK(tm_pagemap_zap(pagemap, (uintptr_t)bytes, pages, 8, done));
        for (unsigned i = 0; i < 8; i++) EXPECT(done[i], expected[i]);
    }
    OK(tm_pagemap_look(pagemap, (uintptr_t)bytes, pages, 8, state));
    for (unsigned i = 0; i < 8; i++) EXPECT(state[i] > 0, i == 2 || i == 5);
}

static void check_fault(tm_pagemap *pagemap) {
    static const uint32_t pages[2] = {0, 1};
    uint16_t state[2];
    uint64_t ns = 0;
    unsigned char *bytes = map_memory_file(2);
    sink = bytes[PAGE];
    int status = tm_pagemap_fault_ns(pagemap, (uintptr_t)bytes, 1, &ns);
    if (status == -EINVAL) return; /* before Linux 5.14 */
    OK(status);
    TRUE(ns > 50 && ns < 1000000000);
    OK(tm_pagemap_look(pagemap, (uintptr_t)bytes, pages, 2, state));
    EXPECT(state[0], 0);
    TRUE(state[1] > 0);
    OK(munmap(bytes, 2 * PAGE));
    EXPECT(tm_pagemap_fault_ns(pagemap, (uintptr_t)bytes, 1, &ns), -EAGAIN);
}

static unsigned mappings(const unsigned char *bytes, uint64_t length) {
    char line[512];
    unsigned long start, end;
    unsigned count = 0;
    FILE *maps = fopen("/proc/self/maps", "r");
    while (fgets(line, sizeof line, maps) != NULL)
        if (sscanf(line, "%lx-%lx", &start, &end) == 2 && start >= (uintptr_t)bytes && end <= (uintptr_t)bytes + length) count++;
    fclose(maps);
    return count;
}

static void check_split(tm_pagemap *pagemap) {
    unsigned char *bytes = map_memory_file(10);
    EXPECT(mappings(bytes, 10 * PAGE), 1);
    OK(tm_pagemap_split(pagemap, (uintptr_t)bytes, 10, 1));
    EXPECT(mappings(bytes, 10 * PAGE), 10);
    OK(tm_pagemap_split(pagemap, (uintptr_t)bytes, 10, 4));
    EXPECT(mappings(bytes, 10 * PAGE), 3);
    OK(tm_pagemap_split(pagemap, (uintptr_t)bytes, 10, 0));
    EXPECT(mappings(bytes, 10 * PAGE), 1);
}

int main(void) {
    for (int vectored = 1; vectored >= 0; vectored--) {
        tm_pagemap *pagemap;
        OK(tm_pagemap_open_as(true, vectored, &pagemap));
        check_all(pagemap, 1);
        check_all(pagemap, 2);
        check_fault(pagemap);
        check_split(pagemap);
        check_left(pagemap);
        tm_pagemap_close(pagemap);
    }
    return 0;
}
