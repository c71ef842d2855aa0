/* Ring: one event of the kernel and the buffers that it fills: samples and sideband records, or an AUX area.
 *
 * Moves records out whole and in order; never looks into them, but for the count of lost ones. The kernel does not
 * overwrite what was not read: it drops new records, and counts them.
 */
#include "ring.h"

#include <stdlib.h>
#include <string.h>

/* perf_event_header */
typedef struct {
    uint32_t type;
    uint16_t misc, size;
} header;
#define RECORD_LOST 2u /* { header; u64 id, lost; ... } */
#define RECORD_UNIT 8u

struct tm_ring {
    tm_prim_perf perf;
    uint64_t lost; /* as records told: what older kernels offer */
};

/* What is written and unread; more than there is room for is no position of the kernel's. */
static int unread(const tm_buffer *buffer, uint64_t *tail, uint64_t *bytes) {
    uint64_t head = __atomic_load_n(buffer->head, __ATOMIC_ACQUIRE);
    *tail = *buffer->tail; /* ours alone */
    *bytes = head - *tail;
    if (*bytes <= buffer->bytes) return 0;
    __atomic_store_n(buffer->tail, head, __ATOMIC_RELEASE);
    return TM_E_RANGE;
}

static void copy_out(const tm_buffer *buffer, uint64_t position, void *destination, uint64_t bytes) {
    uint64_t at = position & (buffer->bytes - 1), first = tm_min(bytes, buffer->bytes - at);
    memcpy(destination, buffer->data + at, first);
    memcpy((unsigned char *)destination + first, buffer->data, bytes - first);
}

int tm_buffer_read_records(tm_buffer *buffer, void *records, uint64_t capacity, uint64_t *got, uint64_t *lost) {
    uint64_t tail, available, taken = 0;
    *got = 0;
    int status = unread(buffer, &tail, &available);
    while (status == 0 && taken < available) {
        header next = {0};
        copy_out(buffer, tail + taken, &next, tm_min(sizeof next, available - taken));
        bool sound = next.size >= sizeof next && next.size % RECORD_UNIT == 0 && next.size <= available - taken;
        if (!sound)
            status = TM_E_RANGE;
        else if (next.size > capacity - taken)
            status = TM_E_SHORT;
        else {
            if (next.type == RECORD_LOST && next.size >= sizeof next + 2 * sizeof(uint64_t)) {
                uint64_t count;
                copy_out(buffer, tail + taken + sizeof next + sizeof(uint64_t), &count, sizeof count);
                *lost += count;
            }
            taken += next.size;
        }
    }
    if (taken > 0) { /* what stopped us is the next call's to tell */
        copy_out(buffer, tail, records, taken);
        __atomic_store_n(buffer->tail, tail + taken, __ATOMIC_RELEASE);
        *got = taken;
        return 0;
    }
    if (status == TM_E_RANGE) __atomic_store_n(buffer->tail, tail + available, __ATOMIC_RELEASE);
    return status;
}

int tm_buffer_read_bytes(tm_buffer *buffer, void *bytes, uint64_t capacity, uint64_t *got) {
    uint64_t tail, available;
    *got = 0;
    int status = unread(buffer, &tail, &available);
    if (status < 0) return status;
    uint64_t taken = tm_min(available, capacity);
    copy_out(buffer, tail, bytes, taken);
    __atomic_store_n(buffer->tail, tail + taken, __ATOMIC_RELEASE);
    *got = taken;
    return 0;
}

static bool is_power_of_pages(uint64_t bytes) {
    return bytes >= tm_prim_os_page() && bytes <= TM_BYTES_MAX && (bytes & (bytes - 1)) == 0;
}

int tm_ring_open(const tm_event *event, int32_t pid, int32_t cpu, const tm_ring *leader, uint64_t bytes,
                 uint64_t aux_bytes, tm_ring **ring) {
    if (!is_power_of_pages(bytes) || (aux_bytes != 0 && !is_power_of_pages(aux_bytes))) return -EINVAL;
    if ((event->flags & TM_EVENT_INHERIT) && cpu < 0) return -EINVAL;
    tm_ring *made = calloc(1, sizeof *made);
    if (made == NULL) return -ENOMEM;
    int group = leader != NULL ? leader->perf.fd : -1;
    int status = tm_prim_perf_open(event, pid, cpu, group, bytes, aux_bytes, &made->perf);
    if (status < 0) {
        free(made);
        return status;
    }
    /* Only now: devices with an AUX area need it from their first sample on. */
    if (!(event->flags & (TM_EVENT_DISABLED | TM_EVENT_ON_EXEC))) status = tm_prim_perf_enable(made->perf.fd);
    if (status < 0) {
        tm_ring_close(made);
        return status;
    }
    *ring = made;
    return 0;
}

int tm_ring_fd(const tm_ring *ring) { return ring->perf.fd; }

int tm_ring_enable(tm_ring *ring) { return tm_prim_perf_enable(ring->perf.fd); }

int tm_ring_disable(tm_ring *ring) { return tm_prim_perf_disable(ring->perf.fd); }

int tm_ring_count(tm_ring *ring, uint64_t *id, uint64_t *value, uint64_t *lost) {
    int status = tm_prim_perf_count(ring->perf.fd, id, value, lost);
    if (status == 0 && *lost == UINT64_MAX) *lost = __atomic_load_n(&ring->lost, __ATOMIC_RELAXED);
    return status;
}

int tm_ring_read(tm_ring *ring, void *records, uint64_t capacity, uint64_t *got) {
    uint64_t lost = 0;
    int status = tm_buffer_read_records(&ring->perf.records, records, capacity, got, &lost);
    if (lost > 0) (void)__atomic_fetch_add(&ring->lost, lost, __ATOMIC_RELAXED);
    return status;
}

int tm_ring_read_aux(tm_ring *ring, void *bytes, uint64_t capacity, uint64_t *got) {
    if (ring->perf.aux.bytes == 0) {
        *got = 0;
        return -EINVAL;
    }
    return tm_buffer_read_bytes(&ring->perf.aux, bytes, capacity, got);
}

void tm_ring_close(tm_ring *ring) {
    if (ring == NULL) return;
    tm_prim_perf_close(&ring->perf);
    free(ring);
}
