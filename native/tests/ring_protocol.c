/* The reading side of a ring, with the test for the kernel: whole records across the end, and damage. */
#include "check.h"
#include "ring.h"

#define BYTES 4096u

typedef struct {
    uint32_t type;
    uint16_t misc, size;
} header;

static unsigned char memory[BYTES];
static uint64_t head, tail;
static tm_buffer ring = {memory, BYTES, &head, &tail};
static unsigned char out[2 * BYTES];
static uint64_t got, lost;

static void put(const void *bytes, uint64_t count) {
    for (uint64_t i = 0; i < count; i++) memory[(head + i) % BYTES] = ((const unsigned char *)bytes)[i];
    head += count;
}

/* A record whose body repeats its number. */
static void put_record(uint32_t type, uint16_t size, unsigned char number) {
    unsigned char body[BYTES];
    header record = {type, 0, size};
    memset(body, number, sizeof body);
    memcpy(body, &record, sizeof record);
    put(body, size);
}

static void empty_at(uint64_t position) { head = tail = position; }

static void keeps_order_across_the_end(void) {
    uint64_t seed = 7;
    unsigned char written = 0, seen = 0;
    empty_at(UINT64_MAX - 3 * BYTES + 1); /* so that positions wrap too */
    for (int round = 0; round < 2000; round++) {
        for (uint16_t size; (size = (uint16_t)(8 + random_next(&seed) % 60 * 8)), BYTES - (head - tail) >= size;)
            put_record(9, size, written++);
        OK(tm_buffer_read_records(&ring, out, 8 + 60 * 8 + random_next(&seed) % BYTES, &got, &lost));
        TRUE(got > 0);
        for (uint64_t at = 0; at < got; seen++) {
            header record;
            memcpy(&record, out + at, sizeof record);
            for (uint64_t i = sizeof record; i < record.size; i++) EXPECT(out[at + i], seen);
            at += record.size;
        }
    }
    OK(tm_buffer_read_records(&ring, out, sizeof out, &got, &lost));
    EXPECT(tail, head);
}

static void stops_at_what_does_not_fit(void) {
    empty_at(0);
    put_record(9, 64, 1);
    put_record(9, 128, 2);
    EXPECT(tm_buffer_read_records(&ring, out, 63, &got, &lost), TM_E_SHORT);
    EXPECT(got, 0);
    OK(tm_buffer_read_records(&ring, out, 191, &got, &lost));
    EXPECT(got, 64);
    OK(tm_buffer_read_records(&ring, out, 128, &got, &lost));
    EXPECT(got, 128);
    OK(tm_buffer_read_records(&ring, out, 0, &got, &lost));
    EXPECT(got, 0);
}

static void adds_up_lost_records(void) {
    struct {
        header header;
        uint64_t id, lost;
    } record = {{2, 0, 24}, 5, 1000};
    empty_at(BYTES - 8);
    lost = 0;
    for (int i = 0; i < 3; i++) put(&record, sizeof record);
    OK(tm_buffer_read_records(&ring, out, sizeof out, &got, &lost));
    EXPECT(got, 72);
    EXPECT(lost, 3000);
}

/* Each size is one that no record has; what was sound before it still comes out. */
static void drops_damage(void) {
    const uint16_t sizes[] = {0, 7, 9, 60, 512, 65528};
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        header bad = {9, 0, sizes[i]};
        empty_at(BYTES - 40);
        put_record(9, 40, 3);
        put(&bad, sizeof bad);
        put_record(9, 64, 4);
        OK(tm_buffer_read_records(&ring, out, sizeof out, &got, &lost));
        EXPECT(got, 40);
        EXPECT(tm_buffer_read_records(&ring, out, sizeof out, &got, &lost), TM_E_RANGE);
        EXPECT(got, 0);
        EXPECT(tail, head);
        put_record(9, 48, 5);
        OK(tm_buffer_read_records(&ring, out, sizeof out, &got, &lost));
        EXPECT(got, 48);
    }
    empty_at(0);
    head = 4; /* half a header */
    EXPECT(tm_buffer_read_records(&ring, out, sizeof out, &got, &lost), TM_E_RANGE);
    head = tail + BYTES + 8; /* more than it can hold */
    EXPECT(tm_buffer_read_records(&ring, out, sizeof out, &got, &lost), TM_E_RANGE);
    head = tail - 8;
    EXPECT(tm_buffer_read_bytes(&ring, out, sizeof out, &got), TM_E_RANGE);
    EXPECT(tail, head);
}

static void survives_noise(void) {
    uint64_t seed = 11;
    for (int round = 0; round < 20000; round++) {
        random_fill(memory, 512, random_next(&seed));
        for (unsigned at = 0; at < 512; at += 8) /* often a plausible size */
            if (random_next(&seed) % 2)
                memory[at + 6] = (unsigned char)(random_next(&seed) % 9 * 8), memory[at + 7] = 0;
        tail = random_next(&seed);
        head = tail + random_next(&seed) % (BYTES + 16);
        for (int calls = 0; head != tail; calls++) {
            (void)tm_buffer_read_records(&ring, out, 65536, &got, &lost);
            TRUE(calls < 3);
        }
    }
}

static void streams_bytes(void) {
    unsigned char written = 0, seen = 0;
    uint64_t seed = 3;
    empty_at(BYTES - 1);
    for (int round = 0; round < 1000; round++) {
        for (uint64_t n = random_next(&seed) % (BYTES - (head - tail) + 1); n > 0; n--) put(&written, 1), written++;
        OK(tm_buffer_read_bytes(&ring, out, random_next(&seed) % BYTES, &got));
        for (uint64_t i = 0; i < got; i++, seen++) EXPECT(out[i], seen);
    }
}

int main(void) {
    keeps_order_across_the_end();
    stops_at_what_does_not_fit();
    adds_up_lost_records();
    drops_damage();
    survives_noise();
    streams_bytes();
    return 0;
}
