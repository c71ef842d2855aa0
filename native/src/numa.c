/* Numa: on which nodes the pages of a segment lie, and moving them between nodes. Never looks at a page's bytes. */
#include <stdlib.h>

#include "internal.h"

/* Pages of one call: enough that draining the lists of every CPU, which each call does, costs little beside copying
 * them; no more, because where the target has no room for 2 MiB in one piece, the kernel splits all that it was given. */
#define PAGES 16u
#define OS_PAGES_MAX 512u
#define ASKED_MAX 3

#define PENDING INT32_MIN        /* not tried */
#define UNMAPPED (INT32_MIN + 1) /* tried, and found unmapped afterwards: split, or just being moved by others */
#define UNTOLD INT32_MIN         /* a status that the kernel did not write */

struct tm_numa {
    tm_pagemap *pagemap;
    uint32_t os_pages; /* of a page */
};

/* Pages that go to the kernel together. The addresses of page i are those from start[i] to before start[i + 1]: one
 * where a 2 MiB entry maps it, since a second one fails there, otherwise one for each of its OS pages. */
struct batch {
    const tm_segment *segment;
    bool full; /* the target has no room for a page in one piece: the kernel has split one, and shall not split more */
    uint32_t count;
    uint32_t page[PAGES]; /* its number */
    int32_t *result[PAGES];
    uint16_t state[PAGES];
    int16_t node[PAGES];
    uint32_t start[PAGES + 1];
    void *address[PAGES * OS_PAGES_MAX];
    int lies[PAGES * OS_PAGES_MAX], wanted[PAGES * OS_PAGES_MAX], told[PAGES * OS_PAGES_MAX];
};

int tm_numa_open(tm_numa **numa) {
    tm_numa *made = malloc(sizeof *made);
    if (made == NULL) return -ENOMEM;
    int status = tm_pagemap_open(&made->pagemap);
    if (status < 0) {
        free(made);
        return status;
    }
    made->os_pages = (uint32_t)(TM_PAGE_BYTES / tm_prim_os_page());
    *numa = made;
    return 0;
}

void tm_numa_close(tm_numa *numa) {
    if (numa == NULL) return;
    tm_pagemap_close(numa->pagemap);
    free(numa);
}

static char *page_address(const tm_segment *segment, uint32_t page) {
    return (char *)tm_segment_address(segment) + (uint64_t)page * TM_PAGE_BYTES;
}

/* --- where ------------------------------------------------------------------------------------------------------ */

/* Enter into our page tables what is in memory of a page, for the kernel tells of no other; touching the rest would
 * allocate it. Waits for an OS page that is just being moved. True if there was anything to map. */
static bool map_resident(const tm_numa *numa, const tm_segment *segment, uint32_t page) {
    unsigned char resident[OS_PAGES_MAX];
    char *address = page_address(segment, page);
    uint64_t os_page = TM_PAGE_BYTES / numa->os_pages;
    bool mapped = false;
    if (tm_prim_resident(address, TM_PAGE_BYTES, tm_segment_fd(segment), resident) < 0) return false;
    for (uint32_t i = 0, end; i < numa->os_pages; i = end + 1) {
        for (end = i; end < numa->os_pages && resident[end] & 1;) end++;
        if (end > i && tm_prim_populate_read(address + i * os_page, (end - i) * os_page) == 0) mapped = true;
    }
    return mapped;
}

static uint32_t addresses_of(const tm_numa *numa, uint16_t state) {
    if ((state & TM_PAGE_PRESENT) == 0) return 0;
    return state & TM_PAGE_HUGE ? 1 : numa->os_pages;
}

static int prepare(tm_numa *numa, struct batch *batch) {
    uint64_t start = (uintptr_t)tm_segment_address(batch->segment);
    int status = tm_pagemap_look(numa->pagemap, start, batch->page, batch->count, batch->state);
    if (status < 0) return status;
    bool mapped = false;
    for (uint32_t i = 0; i < batch->count; i++)
        if ((batch->state[i] & TM_PAGE_PRESENT) < numa->os_pages)
            mapped = map_resident(numa, batch->segment, batch->page[i]) || mapped;
    if (mapped) status = tm_pagemap_look(numa->pagemap, start, batch->page, batch->count, batch->state);
    uint32_t used = 0;
    for (uint32_t i = 0; i < batch->count; i++) {
        char *address = page_address(batch->segment, batch->page[i]);
        uint32_t end = used + addresses_of(numa, batch->state[i]);
        batch->start[i] = used;
        for (; used < end; address += TM_PAGE_BYTES / numa->os_pages) batch->address[used++] = address;
    }
    batch->start[batch->count] = used;
    return status;
}

/* Sets node[i] by lies[]; how many of its addresses have one. */
static uint32_t settle(struct batch *batch, uint32_t i) {
    uint32_t found = 0;
    batch->node[i] = TM_NODE_ABSENT;
    for (uint32_t k = batch->start[i]; k < batch->start[i + 1]; k++) {
        if (batch->lies[k] < 0) continue;
        if (found++ == 0) batch->node[i] = (int16_t)batch->lies[k];
        if (batch->node[i] != batch->lies[k]) batch->node[i] = TM_NODE_MIXED;
    }
    return found;
}

/* Asks the kernel; again, where somebody was just moving a page, which then seems to be nowhere. */
static int ask(tm_numa *numa, struct batch *batch) {
    for (int asked = 1;; asked++) {
        int status = tm_prim_nodes(batch->address, batch->start[batch->count], batch->lies);
        if (status < 0) return status;
        bool moving = false;
        for (uint32_t i = 0; i < batch->count; i++) {
            uint32_t present = batch->state[i] & TM_PAGE_HUGE ? 1 : batch->state[i] & TM_PAGE_PRESENT;
            if (settle(batch, i) < present) moving = map_resident(numa, batch->segment, batch->page[i]) || moving;
        }
        if (!moving || asked == ASKED_MAX) return 0;
    }
}

int tm_numa_where(tm_numa *numa, const tm_segment *segment, uint32_t first, uint32_t count, int16_t *nodes) {
    if (!tm_within(first, count, tm_segment_bytes(segment) / TM_PAGE_BYTES)) return TM_E_RANGE;
    struct batch *batch = malloc(sizeof *batch);
    if (batch == NULL) return -ENOMEM;
    batch->segment = segment;
    int status = 0;
    for (uint32_t at = 0; at < count && status == 0; at += batch->count) {
        batch->count = (uint32_t)tm_min(count - at, PAGES);
        for (uint32_t i = 0; i < batch->count; i++) batch->page[i] = first + at + i;
        status = prepare(numa, batch);
        if (status == 0) status = ask(numa, batch);
        for (uint32_t i = 0; i < batch->count && status == 0; i++) nodes[at + i] = batch->node[i];
    }
    free(batch);
    return status;
}

/* --- move ------------------------------------------------------------------------------------------------------- */

/* Keep the addresses that lie on another node, and give the pages that need or get no call their results. */
static void drop(struct batch *batch, int node) {
    uint32_t kept = 0;
    for (uint32_t i = 0; i < batch->count; i++) {
        uint32_t at = batch->start[i], end = batch->start[i + 1];
        bool huge = batch->state[i] & TM_PAGE_HUGE, tried = *batch->result[i] == UNMAPPED;
        if (tried && !huge) batch->full = true;
        batch->start[i] = kept;
        for (; at < end; at++)
            if (batch->lies[at] >= 0 && batch->lies[at] != node) batch->address[kept++] = batch->address[at];
        if (kept == batch->start[i]) {
            *batch->result[i] = batch->node[i] == TM_NODE_ABSENT ? -ENOENT : tried ? TM_MOVED : TM_WAS_THERE;
        } else if (batch->full && (huge || tried)) {
            *batch->result[i] = -ENOMEM;
            kept = batch->start[i];
        }
    }
    batch->start[batch->count] = kept;
}

/* First address that was not tried. Without a status are those of the list that failed and those after it, and between
 * them is the one that ended the list. */
static uint32_t first_untried(const int *told, uint32_t count) {
    uint32_t at = 0;
    while (at < count && told[at] != UNTOLD) at++;
    while (at < count && told[at] == UNTOLD) at++;
    return at;
}

/* The result of an address; `untried` is the first that was not tried. */
static int32_t verdict(const struct batch *batch, uint32_t at, uint32_t untried, int node, int moved) {
    int told = batch->told[at];
    if (batch->lies[at] == node) return TM_MOVED;
    if (told != UNTOLD && told < 0) return told == -EAGAIN ? -EBUSY : told;
    if (moved == -ENOMEM) return -ENOMEM;
    return at >= untried ? PENDING : -EBUSY;
}

/* The results of a call that told `moved`, by where the pages lie now. */
static void judge(struct batch *batch, int node, int moved) {
    uint32_t untried = first_untried(batch->told, batch->start[batch->count]);
    for (uint32_t i = 0; i < batch->count; i++) {
        uint32_t at = batch->start[i], end = batch->start[i + 1];
        if (at == end) continue;
        int32_t result = TM_MOVED;
        bool unmapped = batch->state[i] & TM_PAGE_HUGE && batch->lies[at] == -ENOENT && at < untried;
        for (; at < end; at++) {
            int32_t one = verdict(batch, at, untried, node, moved);
            if (one != TM_MOVED && (result == TM_MOVED || result == PENDING)) result = one;
        }
        /* Once is enough: what is unmapped again and again is not ours to wait for. */
        *batch->result[i] = unmapped && *batch->result[i] == PENDING ? UNMAPPED : result;
    }
}

/* One call for the pages of the batch; each gets a result, or stays PENDING or UNMAPPED. */
static int move_batch(tm_numa *numa, struct batch *batch, int node, int flags) {
    int status = prepare(numa, batch);
    if (status == 0) status = ask(numa, batch);
    if (status < 0) return status;
    drop(batch, node);
    uint32_t count = batch->start[batch->count];
    if (count == 0) return 0;
    for (uint32_t at = 0; at < count; at++) {
        batch->wanted[at] = node;
        batch->told[at] = UNTOLD;
    }
    int moved = tm_prim_move(batch->address, count, batch->wanted, flags & TM_MOVE_ALL, batch->told);
    if (moved < 0 && moved != -ENOMEM) return moved;
    status = tm_prim_nodes(batch->address, count, batch->lies);
    if (status == 0) judge(batch, node, moved);
    return status;
}

static bool is_open(int32_t result) { return result == PENDING || result == UNMAPPED; }

int tm_numa_move(tm_numa *numa, const tm_segment *segment, const uint32_t *pages, uint32_t count, unsigned node, int flags,
                 int32_t *results) {
    if (flags & ~TM_MOVE_ALL) return -EINVAL;
    for (uint32_t i = 0; i < count; i++) {
        if (i > 0 && pages[i] <= pages[i - 1]) return -EINVAL;
        if (pages[i] >= tm_segment_bytes(segment) / TM_PAGE_BYTES) return TM_E_RANGE;
    }
    struct batch *batch = malloc(sizeof *batch);
    if (batch == NULL) return -ENOMEM;
    batch->segment = segment;
    batch->full = false;
    for (uint32_t i = 0; i < count; i++) results[i] = PENDING;
    int status = 0;
    for (uint32_t at = 0; status == 0;) {
        while (at < count && !is_open(results[at])) at++;
        if (at == count) break;
        batch->count = 0;
        for (uint32_t i = at; i < count && batch->count < PAGES; i++) {
            if (!is_open(results[i])) continue;
            batch->page[batch->count] = pages[i];
            batch->result[batch->count++] = &results[i];
        }
        status = move_batch(numa, batch, (int)node, flags);
    }
    free(batch);
    return status;
}
