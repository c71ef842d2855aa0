/* Which pages are mapped, by PAGEMAP_SCAN and without it: counted right beyond 512 runs, private memory told apart. */
#define _DEFAULT_SOURCE
#include <sys/mman.h>
#include <sys/wait.h>

#include "check.h"
#include "internal.h"

#define PAGES 13
#define STRIDE UINT64_C(16384)
#define WINDOW UINT64_C(65536) /* what the kernel maps around a touched OS page */

static volatile unsigned char sink;

static unsigned char *map_memory_file(uint64_t pages) {
    int fd;
    void *address;
    OK(tm_prim_memory_file("look", 0, &fd));
    OK(tm_prim_resize(fd, pages * PAGE));
    OK(tm_prim_reserve(pages * PAGE, &address));
    OK(tm_prim_map(address, pages * PAGE, fd, 0, TM_PROTECT_READ));
    close(fd);
    return address;
}

/* OS pages of [bytes, bytes+length) that are mapped, counted one by one. */
static unsigned mapped(const unsigned char *bytes, uint64_t length) {
    unsigned count = 0;
    uint64_t entry;
    int fd = open("/proc/self/pagemap", O_RDONLY);
    for (uint64_t at = 0; at < length; at += 4096) {
        EXPECT(pread(fd, &entry, 8, (off_t)(((uintptr_t)bytes + at) / 4096 * 8)), 8);
        count += entry >> 63;
    }
    close(fd);
    return count;
}

static void map_runs(unsigned char *bytes, unsigned runs) {
    OK(madvise(bytes, PAGES * PAGE, MADV_DONTNEED));
    for (uint64_t at = 0; at < runs * STRIDE; at += 4096) sink = bytes[at];
    for (unsigned run = 0; run < runs; run++)
        OK(madvise(bytes + run * STRIDE + STRIDE / 2, STRIDE / 2, MADV_DONTNEED));
}

/* Alternating mapped and unmapped runs, around the sizes of the kernel's and of our own buffers. */
static void check_runs(tm_pagemap *pagemap) {
    static const uint32_t all[PAGES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
    static const unsigned counts[] = {1, 511, 512, 513, 1024, 1025, 1535};
    uint16_t state[PAGES];
    unsigned char *bytes = map_memory_file(PAGES);
    (void)madvise(bytes, PAGES * PAGE, MADV_NOHUGEPAGE);
    for (unsigned c = 0; c < sizeof counts / sizeof *counts; c++) {
        unsigned found, before, after, tries = 0;
        do { /* reclaim and migration of the host's own may take OS pages away between two looks */
            TRUE(tries++ < 100);
            map_runs(bytes, counts[c]);
            before = mapped(bytes, PAGES * PAGE);
            OK(tm_pagemap_look(pagemap, (uintptr_t)bytes, all, PAGES, state));
            after = mapped(bytes, PAGES * PAGE);
        } while (before != after || before < counts[c] * 2);
        found = 0;
        for (unsigned i = 0; i < PAGES; i++) {
            EXPECT(state[i] & (TM_PAGE_PRIVATE | TM_PAGE_HUGE), 0);
            found += state[i] & TM_PAGE_PRESENT;
        }
        EXPECT(found, before);
    }
}

/* Only what was asked for is told, in its own place, whatever lies in the gaps. */
static void check_subset(tm_pagemap *pagemap) {
    enum { MANY = 200 };
    static const uint32_t some[] = {0, 3, 4, 17, 60, 61, 150, 199};
    uint16_t state[8];
    unsigned char *bytes = map_memory_file(MANY);
    for (uint32_t page = 0; page < MANY; page += 3) sink = bytes[page * PAGE + 99999];
    OK(tm_pagemap_look(pagemap, (uintptr_t)bytes, some, 8, state));
    for (unsigned i = 0; i < 8; i++) {
        EXPECT(state[i] > 0, some[i] % 3 == 0);
        TRUE(state[i] <= WINDOW / 4096);
    }
}

static void check_private(tm_pagemap *pagemap) {
    static const uint32_t pages[] = {0, 1, 2};
    uint16_t state[3];
    unsigned char *bytes = map_memory_file(3);
    sink = bytes[0];
    TRUE(mmap(bytes + PAGE, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED);
    bytes[PAGE] = 1;
    sink = bytes[PAGE + 4096];
    OK(tm_pagemap_look(pagemap, (uintptr_t)bytes, pages, 3, state));
    EXPECT(state[0] & TM_PAGE_PRIVATE, 0);
    EXPECT(state[1] & TM_PAGE_PRIVATE, TM_PAGE_PRIVATE);
    TRUE((state[1] & TM_PAGE_PRESENT) > 1);
    EXPECT(state[2], 0);
}

static void check_arguments(tm_pagemap *pagemap) {
    static const uint32_t twice[] = {1, 1}, falling[] = {2, 1};
    uint16_t state[2];
    uint8_t done[2];
    EXPECT(tm_pagemap_look(pagemap, 4096, twice, 1, state), TM_E_ALIGN);
    EXPECT(tm_pagemap_look(pagemap, PAGE, twice, 2, state), -EINVAL);
    EXPECT(tm_pagemap_zap(pagemap, PAGE, falling, 2, done), -EINVAL);
    OK(tm_pagemap_look(pagemap, PAGE, NULL, 0, state));
    pid_t child = fork();
    if (child == 0) _exit(tm_pagemap_look(pagemap, PAGE, falling, 1, state) == -ESRCH ? 0 : 1);
    int status;
    EXPECT(waitpid(child, &status, 0), child);
    EXPECT(status, 0);
}

int main(void) {
    for (int scans = 1; scans >= 0; scans--) {
        tm_pagemap *pagemap;
        OK(tm_pagemap_open_as(scans, true, &pagemap));
        if (!scans) EXPECT(tm_pagemap_scans(pagemap), 0);
        check_runs(pagemap);
        check_subset(pagemap);
        check_private(pagemap);
        check_arguments(pagemap);
        tm_pagemap_close(pagemap);
    }
    return 0;
}
