/* A ring of the kernel's own: every first touch of a page is a sample with its address, or counted as lost. */
#define _GNU_SOURCE
#include <sys/mman.h>

#include "check.h"

#define PAGES 3000u
/* TID, ADDR and CALLCHAIN: records of many sizes, so that some straddle the ring's end */
#define SAMPLE_TYPE (2u | 8u | 32u)

static const tm_event faults = {
    .type = 1, .config = 5, .period = 1, .sample_type = SAMPLE_TYPE,
    .flags = TM_EVENT_EXCLUDE_KERNEL | TM_EVENT_DISABLED};

static uint64_t os_page;

static unsigned char *fresh(void) {
    unsigned char *pages = mmap(NULL, PAGES * os_page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TRUE(pages != MAP_FAILED);
    OK(madvise(pages, PAGES * os_page, MADV_NOHUGEPAGE));
    return pages;
}

struct seen {
    const unsigned char *pages;
    uint64_t addresses[PAGES]; /* of these pages; a sanitizer's own memory faults as well */
    uint64_t kept, samples;
};

static void drain(tm_ring *ring, const tm_decoder *decoder, struct seen *seen) {
    static unsigned char bytes[1 << 16];
    static tm_sample rows[1 << 11];
    static tm_record records[1 << 11];
    uint64_t got, used, found, rest;
    for (;;) {
        OK(tm_ring_read(ring, bytes, sizeof bytes, &got));
        if (got == 0) return;
        OK(tm_decoder_decode(decoder, bytes, got, rows, 1 << 11, records, 1 << 11, &used, &found, &rest));
        EXPECT(used, got);
        for (uint64_t i = 0; i < found; i++) {
            EXPECT(rows[i].tid, getpid());
            seen->samples++;
            if (rows[i].addr - (uintptr_t)seen->pages >= PAGES * os_page) continue;
            TRUE(seen->kept < PAGES);
            seen->addresses[seen->kept++] = rows[i].addr;
        }
    }
}

int main(void) {
    static uint64_t touched[PAGES];
    static struct seen seen;
    uint64_t seed = 5, id, value, lost, got;
    const tm_layout layout = {.sample_type = SAMPLE_TYPE};
    tm_decoder *decoder;
    tm_ring *ring;
    os_page = (uint64_t)sysconf(_SC_PAGESIZE);
    OK(tm_decoder_open(&layout, 1, NULL, NULL, 0, &decoder));
    EXPECT(tm_ring_open(&faults, 0, -1, NULL, 3 * os_page, 0, &ring), -EINVAL);
    EXPECT(tm_ring_open(&faults, 0, -1, NULL, os_page, 100, &ring), -EINVAL);
    tm_event inherit = faults;
    inherit.flags |= TM_EVENT_INHERIT;
    EXPECT(tm_ring_open(&inherit, 0, -1, NULL, os_page, 0, &ring), -EINVAL);
    int status = tm_ring_open(&faults, 0, -1, NULL, 8 * os_page, 0, &ring);
    if (status < 0 && status != -EINVAL) {
        fprintf(stderr, "no perf events here: %s\n", tm_status_text(status));
        return SKIPPED;
    }
    OK(status);

    unsigned char *pages = fresh();
    seen.pages = pages;
    drain(ring, decoder, &seen); /* its code has run, and touches nothing new later */
    OK(tm_ring_enable(ring));
    for (unsigned i = 0; i < PAGES; i++) {
        touched[i] = (uintptr_t)(pages + (uint64_t)(i * 1009 % PAGES) * os_page + random_next(&seed) % os_page);
        *(volatile unsigned char *)touched[i] = 1;
        if (i % 64 == 0) drain(ring, decoder, &seen);
    }
    OK(tm_ring_disable(ring));
    drain(ring, decoder, &seen);
    EXPECT(seen.kept, PAGES);
    for (unsigned i = 0; i < PAGES; i++) EXPECT(seen.addresses[i], touched[i]);
    OK(tm_ring_count(ring, &id, &value, &lost));
    EXPECT(value, seen.samples);
    EXPECT(lost, 0);
    TRUE(id != 0);
    EXPECT(tm_ring_read_aux(ring, touched, sizeof touched, &got), -EINVAL);
    tm_ring_close(ring);

    OK(tm_ring_open(&faults, 0, -1, NULL, os_page, 0, &ring)); /* too small */
    pages = fresh();
    seen = (struct seen){.pages = pages};
    OK(tm_ring_enable(ring));
    for (unsigned i = 0; i < PAGES; i++) pages[i * os_page] = 1;
    OK(tm_ring_disable(ring));
    drain(ring, decoder, &seen);
    OK(tm_ring_count(ring, &id, &value, &lost));
    TRUE(seen.kept > 0);
    TRUE(lost > 0);
    EXPECT(seen.samples + lost, value);
    tm_ring_close(ring);
    tm_decoder_close(decoder);
    return 0;
}
