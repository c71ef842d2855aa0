/* Probe: memory of chosen nodes, and how long reading it takes. Tells times; judges none. */
#include <stdatomic.h>
#include <stdlib.h>

#include "internal.h"

#define LINE_BYTES 64u
#define READ_STEP (2 * (uint64_t)TM_PAGE_BYTES)
#define ADDRESSES 512u

struct line { /* of the cache; all of them form one cycle */
    _Alignas(LINE_BYTES) uint64_t next;
};

struct tm_probe {
    struct line *lines;
    uint64_t bytes;
    uint64_t at; /* where the last loads ended */
    _Atomic uint64_t sum; /* so that no read is for nothing */
};

static uint64_t random_below(uint64_t *state, uint64_t limit) { /* xorshift64 */
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state % limit;
}

/* Sattolo's algorithm (1986): every permutation that is one single cycle is equally likely. No prefetcher knows the next
 * line, and no short cycle fits into a cache. */
static void link_lines(struct line *lines, uint64_t count) {
    uint64_t state = UINT64_C(0x9e3779b97f4a7c15);
    for (uint64_t i = 0; i < count; i++) lines[i].next = i;
    for (uint64_t i = count - 1; i > 0; i--) {
        uint64_t other = random_below(&state, i), next = lines[i].next;
        lines[i].next = lines[other].next;
        lines[other].next = next;
    }
}

static int populate_on(void *address, uint64_t bytes, uint64_t nodes) {
    tm_prim_policy before;
    int status = tm_prim_prefer(nodes, &before);
    if (status < 0) return status;
    status = tm_prim_map_anonymous(address, bytes);
    if (status == 0) status = tm_prim_populate(address, bytes, -1, 0);
    tm_prim_prefer_as(&before);
    return status;
}

int tm_probe_open(uint64_t bytes, uint64_t nodes, tm_probe **probe) {
    if (bytes == 0 || bytes > TM_BYTES_MAX) return TM_E_RANGE;
    bytes = tm_round_up(bytes, TM_PAGE_BYTES);
    tm_probe *made = malloc(sizeof *made);
    if (made == NULL) return -ENOMEM;
    void *address;
    int status = tm_prim_reserve(bytes, &address);
    if (status < 0) {
        free(made);
        return status;
    }
    *made = (tm_probe){.lines = address, .bytes = bytes};
    status = populate_on(address, bytes, nodes);
    if (status < 0) {
        tm_probe_close(made);
        return status;
    }
    link_lines(made->lines, bytes / LINE_BYTES);
    *probe = made;
    return 0;
}

int tm_probe_where(const tm_probe *probe, uint64_t *nodes) {
    void *addresses[ADDRESSES];
    int lies[ADDRESSES];
    uint64_t step = tm_prim_os_page(), mask = 0;
    for (uint64_t at = 0; at < probe->bytes;) {
        unsigned count = 0;
        for (; count < ADDRESSES && at < probe->bytes; at += step) addresses[count++] = (char *)probe->lines + at;
        int status = tm_prim_nodes(addresses, count, lies);
        if (status < 0) return status;
        for (unsigned i = 0; i < count; i++)
            if (lies[i] >= 0 && lies[i] < 64) mask |= UINT64_C(1) << lies[i];
    }
    *nodes = mask;
    return 0;
}

int tm_probe_latency(tm_probe *probe, uint64_t loads, uint64_t *ns) {
    uint64_t at = probe->at, begin = tm_prim_now_ns();
    for (uint64_t i = 0; i < loads; i++) at = probe->lines[at].next;
    probe->at = at;
    *ns = tm_prim_now_ns() - begin;
    return 0;
}

static int sum_step(void *argument, uint64_t offset, uint64_t length) {
    tm_probe *probe = argument;
    const uint64_t *words = (const uint64_t *)(const void *)((const char *)probe->lines + offset);
    uint64_t sum = 0;
    for (uint64_t i = 0; i < length / sizeof *words; i++) sum += words[i];
    atomic_fetch_add(&probe->sum, sum);
    return 0;
}

int tm_probe_bandwidth(tm_probe *probe, unsigned threads, uint64_t *ns) {
    uint64_t begin = tm_prim_now_ns();
    int status = tm_split(probe->bytes, READ_STEP, threads, sum_step, probe);
    *ns = tm_prim_now_ns() - begin;
    return status;
}

void tm_probe_close(tm_probe *probe) {
    if (probe == NULL) return;
    tm_prim_unmap(probe->lines, probe->bytes);
    free(probe);
}
