/* Pagemap: which pages of this process's mappings are mapped, and unmapping them. Never looks at a page's bytes. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* To walk over so many pages that nobody asked for is cheaper than another call: on 2 MiB OS pages, and on small ones. */
#define GAP_HUGE 256
#define GAP_SMALL 1
#define RUNS_A_PAGE 16

struct tm_pagemap {
    int fd;
    int process;
    uint64_t owner; /* the process; after a fork both descriptors still name it, and addresses no longer do */
    bool scans;
    atomic_bool huge; /* whether the pages of the last look were: a guess at what those of the next one are */
    atomic_bool vectored; /* false from the first call on that the kernel cannot serve */
};

int tm_pagemap_open_as(bool scans, bool vectored, tm_pagemap **pagemap) {
    tm_pagemap *made = malloc(sizeof *made);
    if (made == NULL) return -ENOMEM;
    int status = tm_prim_pagemap_open(&made->fd);
    if (status < 0) {
        free(made);
        return status;
    }
    tm_os_run none;
    unsigned count;
    made->owner = tm_prim_process();
    made->scans = scans && tm_prim_pagemap_scan(made->fd, 0, 0, &none, 1, &count) == 0;
    made->process = -1;
    atomic_init(&made->huge, false);
    atomic_init(&made->vectored, vectored && tm_prim_process_open(&made->process) == 0);
    *pagemap = made;
    return 0;
}

int tm_pagemap_open(tm_pagemap **pagemap) { return tm_pagemap_open_as(true, true, pagemap); }

int tm_pagemap_scans(const tm_pagemap *pagemap) { return pagemap->scans; }

void tm_pagemap_close(tm_pagemap *pagemap) {
    if (pagemap == NULL) return;
    tm_prim_close(pagemap->fd);
    tm_prim_close(pagemap->process);
    free(pagemap);
}

static int check(const tm_pagemap *pagemap, uint64_t address, const uint32_t *pages, uint32_t count) {
    if (tm_prim_process() != pagemap->owner) return -ESRCH;
    if (!tm_is_whole_pages(address)) return TM_E_ALIGN;
    for (uint32_t i = 1; i < count; i++)
        if (pages[i] <= pages[i - 1]) return -EINVAL;
    return 0;
}

static uint64_t page_start(uint64_t address, uint32_t page) { return address + (uint64_t)page * TM_PAGE_BYTES; }

/* --- look ------------------------------------------------------------------------------------------------------- */

struct look {
    uint64_t address, os_page;
    const uint32_t *pages;
    uint16_t *state;
    uint32_t next, count; /* pages before `next` are complete */
};

static void add(struct look *look, const tm_os_run *run) {
    while (look->next < look->count && page_start(look->address, look->pages[look->next]) + TM_PAGE_BYTES <= run->start)
        look->next++;
    for (uint32_t i = look->next; i < look->count; i++) {
        uint64_t start = page_start(look->address, look->pages[i]);
        if (start >= run->end) break;
        uint64_t bytes = tm_min(run->end, start + TM_PAGE_BYTES) - tm_max(run->start, start);
        unsigned state = look->state[i] + (unsigned)(bytes / look->os_page);
        if (!(run->facts & TM_OS_FILE)) state |= TM_PAGE_PRIVATE;
        if (run->facts & TM_OS_HUGE) state |= TM_PAGE_HUGE;
        look->state[i] = (uint16_t)state;
    }
}

static int walk(tm_pagemap *pagemap, struct look *look, uint64_t start, uint64_t end) {
    tm_os_run runs[TM_PRIM_RUNS];
    /* The kernel allocates as many, every time; a page on 2 MiB OS pages is at most one run. */
    unsigned capacity = (unsigned)tm_min(TM_PRIM_RUNS, (end - start) / TM_PAGE_BYTES * RUNS_A_PAGE);
    while (start < end) {
        unsigned found;
        int status = pagemap->scans ? tm_prim_pagemap_scan(pagemap->fd, start, end, runs, capacity, &found)
                                    : tm_prim_pagemap_read(pagemap->fd, start, end, runs, capacity, &found);
        if (status < 0) return status;
        for (unsigned i = 0; i < found; i++) add(look, &runs[i]);
        if (found < capacity) break;
        start = runs[found - 1].end;
    }
    return 0;
}

int tm_pagemap_look(tm_pagemap *pagemap, uint64_t address, const uint32_t *pages, uint32_t count, uint16_t *state) {
    int status = check(pagemap, address, pages, count);
    if (status < 0) return status;
    memset(state, 0, count * sizeof *state);
    struct look look = {address, tm_prim_os_page(), pages, state, 0, count};
    uint32_t gap = atomic_load(&pagemap->huge) ? GAP_HUGE : GAP_SMALL;
    bool huge = false, small = false;
    for (uint32_t first = 0, last; first < count && status == 0; first = last + 1) {
        for (last = first; last + 1 < count && pages[last + 1] - pages[last] <= gap;) last++;
        status = walk(pagemap, &look, page_start(address, pages[first]), page_start(address, pages[last]) + TM_PAGE_BYTES);
    }
    for (uint32_t i = 0; i < count; i++) {
        huge = huge || state[i] & TM_PAGE_HUGE;
        small = small || (state[i] & TM_PAGE_PRESENT && !(state[i] & TM_PAGE_HUGE));
    }
    if (huge || small) atomic_store(&pagemap->huge, !small);
    return status;
}

/* --- zap -------------------------------------------------------------------------------------------------------- */

/* Pages from the first one on that are neighbours. */
static uint32_t neighbours(const uint32_t *pages, uint32_t count) {
    uint32_t run = 1;
    while (run < count && pages[run] == pages[run - 1] + 1) run++;
    return run;
}

/* How many of the pages, in order, one call unmapped. pre: 1 <= count <= TM_PRIM_FORGETS */
static uint32_t zap_batch(tm_pagemap *pagemap, uint64_t address, const uint32_t *pages, uint32_t count, int *status) {
    tm_iovec vector[TM_PRIM_FORGETS];
    unsigned parts = 0;
    for (uint32_t i = 0, run; i < count; i += run) {
        run = neighbours(pages + i, count - i);
        vector[parts++] = (tm_iovec){(void *)(uintptr_t)page_start(address, pages[i]), (uint64_t)run * TM_PAGE_BYTES};
    }
    uint64_t done = 0;
    *status = tm_prim_forget_vector(pagemap->process, vector, parts, &done);
    return (uint32_t)(done / TM_PAGE_BYTES);
}

static bool zap_each(uint64_t address, const uint32_t *pages, uint32_t count, uint8_t *done) {
    bool all = true;
    for (uint32_t i = 0; i < count; i++) {
        done[i] = tm_prim_forget((void *)(uintptr_t)page_start(address, pages[i]), TM_PAGE_BYTES) == 0;
        all = all && done[i];
    }
    return all;
}

int tm_pagemap_zap(tm_pagemap *pagemap, uint64_t address, const uint32_t *pages, uint32_t count, uint8_t *done) {
    int status = check(pagemap, address, pages, count);
    if (status < 0) return status;
    memset(done, 0, count);
    for (uint32_t at = 0; at < count;) {
        uint32_t batch = (uint32_t)tm_min(count - at, TM_PRIM_FORGETS);
        if (!atomic_load(&pagemap->vectored)) {
            (void)zap_each(address, pages + at, batch, done + at);
            at += batch;
            continue;
        }
        uint32_t zapped = zap_batch(pagemap, address, pages + at, batch, &status);
        memset(done + at, 1, zapped);
        at += zapped;
        if (zapped == batch) continue;
        uint32_t run = neighbours(pages + at, batch - zapped);
        bool all = zap_each(address, pages + at, run, done + at);
        /* -EINVAL has two meanings: some of it is locked, or the kernel has no such call. */
        if (status == -EPERM || status == -ENOSYS || (status == -EINVAL && all)) atomic_store(&pagemap->vectored, false);
        at += run;
    }
    return 0;
}

int tm_pagemap_fault_ns(tm_pagemap *pagemap, uint64_t address, uint32_t page, uint64_t *ns) {
    uint8_t done;
    int status = tm_pagemap_zap(pagemap, address, &page, 1, &done);
    if (status < 0) return status;
    if (!done) return -EAGAIN;
    uint64_t begin = tm_prim_now_ns();
    /* And not by reading a byte: where the file was cut meanwhile, that would end the process. */
    status = tm_prim_populate_read((void *)(uintptr_t)page_start(address, page), tm_prim_os_page());
    *ns = tm_prim_now_ns() - begin;
    return status;
}

/* --- turn ------------------------------------------------------------------------------------------------------- */

/* Both lists in one, ascending; `count` of them. pre: `into` has room for all */
static uint32_t merge(const uint32_t *a, uint32_t a_count, const uint32_t *b, uint32_t b_count, uint32_t *into) {
    uint32_t i = 0, j = 0, count = 0;
    while (i < a_count || j < b_count) {
        uint32_t next = j == b_count || (i < a_count && a[i] <= b[j]) ? a[i] : b[j];
        i += i < a_count && a[i] == next;
        j += j < b_count && b[j] == next;
        into[count++] = next;
    }
    return count;
}

/* pre: every one of `pages` is in `all` */
static void pick(const uint32_t *all, const uint16_t *states, const uint32_t *pages, uint32_t count, uint16_t *picked) {
    for (uint32_t i = 0, at = 0; i < count; i++) {
        while (all[at] != pages[i]) at++;
        picked[i] = states[at];
    }
}

/* Unmap those that are mapped and not private; `scratch` has room for `count` numbers and as many bytes. */
static int zap_mapped(tm_pagemap *pagemap, uint64_t address, const uint32_t *due, uint32_t count, const uint16_t *state,
                      uint8_t *done, uint32_t *scratch, uint64_t *fault_ns) {
    uint8_t *zapped = (uint8_t *)(scratch + count);
    uint32_t mapped = 0;
    for (uint32_t i = 0; i < count; i++)
        if (state[i] & TM_PAGE_PRESENT && !(state[i] & TM_PAGE_PRIVATE)) scratch[mapped++] = due[i];
    uint64_t cold, warm;
    if (fault_ns != NULL && mapped > 0 && tm_pagemap_fault_ns(pagemap, address, scratch[mapped / 2], &cold) == 0 &&
        tm_pagemap_fault_ns(pagemap, address, scratch[mapped / 2], &warm) == 0)
        *fault_ns = (cold + 3 * warm) / 4; /* what paired runs of a streaming client show */
    int status = tm_pagemap_zap(pagemap, address, scratch, mapped, zapped);
    for (uint32_t i = 0, at = 0; i < count; i++) done[i] = at < mapped && scratch[at] == due[i] ? zapped[at++] : 0;
    return status;
}

int tm_pagemap_turn(tm_pagemap *pagemap, uint64_t address, const uint32_t *was, uint32_t was_count, uint16_t *was_state,
                    const uint32_t *due, uint32_t due_count, uint16_t *due_state, uint8_t *due_done, uint64_t *fault_ns) {
    if (fault_ns != NULL) *fault_ns = 0;
    int status = check(pagemap, address, was, was_count);
    if (status == 0) status = check(pagemap, address, due, due_count);
    if (status < 0 || was_count + due_count == 0) return status;
    uint64_t most = (uint64_t)was_count + due_count;
    uint32_t *all = malloc(most * (sizeof *all + sizeof(uint16_t)));
    if (all == NULL) return -ENOMEM;
    uint16_t *states = (uint16_t *)(all + most);
    uint32_t count = merge(was, was_count, due, due_count, all);
    status = tm_pagemap_look(pagemap, address, all, count, states);
    if (status == 0) {
        pick(all, states, was, was_count, was_state);
        pick(all, states, due, due_count, due_state);
        status = zap_mapped(pagemap, address, due, due_count, due_state, due_done, all, fault_ns);
    }
    free(all);
    return status;
}

int tm_pagemap_split(tm_pagemap *pagemap, uint64_t address, uint32_t pages, uint32_t group) {
    int status = check(pagemap, address, NULL, 0);
    uint32_t step = group > 0 ? group : pages;
    for (uint32_t at = 0; at < pages && status == 0; at += (uint32_t)tm_min(step, pages - at)) {
        uint64_t bytes = tm_min(step, pages - at) * TM_PAGE_BYTES;
        status = tm_prim_dump((void *)(uintptr_t)page_start(address, at), bytes, group == 0 || at / step % 2 == 0);
    }
    return status;
}
