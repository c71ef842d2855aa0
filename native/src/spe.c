/* SPE: packets of Arm's Statistical Profiling Extension -> rows of tm_sample. Keeps nothing from one call to the next.
 *
 * Arm ARM (DDI 0487), "Statistical Profiling Extension: sample record"; read as Linux's tools/perf does
 * (util/arm-spe-decoder), which also says how addresses lose their tags.
 */
#include <string.h>

#include "internal.h"

#define PAD 0x00u
#define END 0x01u
#define TIMESTAMP 0x71u
#define EXTENDED 0x20u /* 0x20 to 0x23: the two upper bits of an index; the header proper comes second */
#define EVENTS 0x42u
#define DATA_SOURCE 0x43u
#define CONTEXT 0x64u
#define OPERATION 0x48u
#define ADDRESS 0xb0u
#define COUNTER 0x98u

#define ADDRESS_BITS ((UINT64_C(1) << 56) - 1)
#define TOP_BYTE (~ADDRESS_BITS)

/* PMSIDR_EL1.MaxSize: no record is longer. */
#define RECORD_BYTES_MAX 2048u

enum { INSTRUCTION, BRANCH_TARGET, DATA_VIRTUAL, DATA_PHYSICAL }; /* indexes of addresses */
enum { TOTAL, ISSUE, TRANSLATION };                              /* indexes of counters */

struct packet {
    unsigned kind; /* a header of those above, without size and index */
    unsigned index;
    uint64_t payload;
};

/* Without the bits for the size, where the kind has several, and for the index. */
static bool kind_of(unsigned header, unsigned *kind) {
    if (header == PAD || header == END || header == TIMESTAMP)
        *kind = header;
    else if ((header & 0xcf) == EVENTS || (header & 0xcf) == DATA_SOURCE)
        *kind = header & 0xcf;
    else if ((header & 0xfc) == CONTEXT || (header & 0xfc) == OPERATION)
        *kind = header & 0xfc;
    else if ((header & 0xf8) == ADDRESS || (header & 0xf8) == COUNTER)
        *kind = header & 0xf8;
    else
        return false;
    return true;
}

/* Bytes of the packet at `at`; 0 if it is none; more than `length` if it is cut off. pre: length > 0 */
static uint64_t packet_read(const unsigned char *at, uint64_t length, struct packet *made) {
    unsigned extended = (at[0] & 0xfc) == EXTENDED;
    if (length < 1 + extended) return length + 1;
    unsigned header = at[extended];
    if (!kind_of(header, &made->kind)) return 0;
    /* An extended PAD asks for alignment; what follows it up to there are zeros, and so padding by themselves. */
    if (extended && made->kind != ADDRESS && made->kind != COUNTER && made->kind != PAD) return 0;
    if (made->kind == PAD || made->kind == END) return 1 + extended;
    uint64_t bytes = UINT64_C(1) << (header >> 4 & 3);
    uint64_t size = 1 + extended + bytes;
    if (length < size) return size;
    made->index = (made->kind == CONTEXT || made->kind == OPERATION ? header & 3 : header & 7) |
                  (extended ? (at[0] & 3u) << 3 : 0);
    made->payload = 0;
    for (uint64_t i = 0; i < bytes; i++) made->payload |= (uint64_t)at[1 + extended + i] << 8 * i;
    return size;
}

/* An instruction's carries its exception level and security state in the top byte: kernels live at the top. */
static uint64_t instruction_address(uint64_t payload) {
    unsigned level = payload >> 61 & 3, normal_world = payload >> 63;
    bool kernel = normal_world && (level == 1 || level == 2);
    return (payload & ADDRESS_BITS) | (kernel ? TOP_BYTE : 0);
}

/* A data address carries a tag there: kernels' addresses are told by bits 52 to 55. */
static uint64_t data_address(uint64_t payload) {
    bool kernel = (payload >> 52 & 0xf) == 0xf;
    return (payload & ADDRESS_BITS) | (kernel ? TOP_BYTE : 0);
}

static uint16_t saturate(uint64_t value) { return (uint16_t)tm_min(value, UINT16_MAX); }

static void apply_address(const struct packet *packet, tm_sample *row, bool *data) {
    switch (packet->index) {
    case INSTRUCTION: row->ip = instruction_address(packet->payload); break;
    case DATA_VIRTUAL: row->addr = data_address(packet->payload); *data = true; break;
    case DATA_PHYSICAL: row->phys_addr = packet->payload & ADDRESS_BITS; *data = true; break;
    default: break; /* BRANCH_TARGET and what later versions add */
    }
}

static void apply(const struct packet *packet, tm_sample *row, bool *data) {
    switch (packet->kind) {
    case TIMESTAMP: row->time = packet->payload; break;
    case EVENTS: row->transaction = packet->payload; break;
    case DATA_SOURCE: row->data_src = packet->payload; break;
    case OPERATION: row->id = packet->payload; break;
    case CONTEXT: row->pid = row->tid = (uint32_t)packet->payload; break; /* what Linux writes there: the thread */
    case ADDRESS: apply_address(packet, row, data); break;
    case COUNTER:
        if (packet->index == TOTAL) row->weight = (uint32_t)tm_min(packet->payload, UINT32_MAX);
        if (packet->index == ISSUE) row->weight2 = saturate(packet->payload);
        if (packet->index == TRANSLATION) row->weight3 = saturate(packet->payload);
        break;
    default: break;
    }
}

int tm_spe_decode(const void *bytes, uint64_t length, tm_sample *samples, uint64_t capacity, uint64_t *used,
                  uint64_t *count, uint64_t *bad) {
    const unsigned char *stream = bytes;
    uint64_t at = 0, begin = 0, rows = 0, skipped = 0; /* begin: of the record that `at` is in */
    tm_sample row = {0};
    bool data = false;
    while (at < length) {
        struct packet packet = {0};
        uint64_t size = packet_read(stream + at, length - at, &packet);
        if (size > length - at && at + size - begin <= RECORD_BYTES_MAX) break;
        bool ends = size > 0 && (packet.kind == END || packet.kind == TIMESTAMP);
        if (size == 0 || at + size - begin > RECORD_BYTES_MAX) { /* what came before in this record is not trusted */
            size = 1;
            skipped++;
            data = false;
            ends = true;
        } else if (packet.kind != PAD)
            apply(&packet, &row, &data);
        if (ends && data) {
            if (rows == capacity) break;
            samples[rows++] = row;
        }
        bool between = at == begin && packet.kind == PAD;
        at += size;
        if (ends || between) {
            begin = at;
            row = (tm_sample){0};
            data = false;
        }
    }
    *used = begin;
    *count = rows;
    *bad = skipped;
    return 0;
}
