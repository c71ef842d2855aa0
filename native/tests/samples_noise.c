/* Decoding never reads outside of what it was given and never stands still, whatever that is. */
#include "check.h"

#define BITS 25
#define BYTES 2048u
#define BOTH_WEIGHTS ((UINT64_C(1) << 14) | (UINT64_C(1) << 24))

static tm_sample rows[BYTES / 8];
static tm_record records[BYTES / 8];
static const uint64_t ids[] = {1, 2, 3};
static const uint16_t of[] = {0, 1, 1};

static void decode_all(const tm_decoder *decoder, const unsigned char *bytes, uint64_t length, uint64_t capacity) {
    uint64_t at = 0, used, found, rest;
    for (;;) {
        int status = tm_decoder_decode(decoder, bytes + at, length - at, rows, capacity, records, capacity, &used,
                                       &found, &rest);
        TRUE(used <= length - at && found <= capacity && rest <= capacity);
        TRUE(status == 0 || status == TM_E_RANGE);
        TRUE(used >= 8 * (found + rest));
        for (uint64_t i = 0; i < rest; i++) TRUE(records[i].offset + records[i].size <= used);
        at += used;
        if (status < 0 || (found < capacity && rest < capacity)) return;
    }
}

/* Half of the rounds have headers that lead from one to the next, so that bodies are reached. */
static void noise(unsigned char *bytes, uint64_t length, uint64_t *seed) {
    random_fill(bytes, length, random_next(seed));
    if (random_next(seed) % 2) return;
    for (uint64_t at = 0; at + 8 <= length;) {
        uint16_t size = (uint16_t)(8 + random_next(seed) % 40 * 8);
        uint32_t type = random_next(seed) % 8 ? 9 : 1;
        memcpy(bytes + at, &type, 4);
        memcpy(bytes + at + 6, &size, 2);
        for (uint64_t i = at + 8; i + 8 <= length && i < at + size; i += 8) /* counts are small now and then */
            if (random_next(seed) % 2) memset(bytes + i + 1, 0, 7), bytes[i] &= 7;
        at += size;
    }
}

int main(void) {
    uint64_t seed = 99;
    unsigned opened = 0;
    for (int round = 0; round < 20000; round++) {
        tm_layout layouts[2];
        for (int i = 0; i < 2; i++) {
            layouts[i] = (tm_layout){random_next(&seed) % (1u << BITS), random_next(&seed) % 32, random_next(&seed),
                                     random_next(&seed), random_next(&seed)};
            if ((layouts[i].sample_type & BOTH_WEIGHTS) == BOTH_WEIGHTS) layouts[i].sample_type ^= BOTH_WEIGHTS;
        }
        uint32_t count = 1 + random_next(&seed) % 2;
        tm_decoder *decoder;
        int status = tm_decoder_open(layouts, count, ids, of, count == 1 ? 1 : 3, &decoder);
        if (status < 0) {
            EXPECT(status, -EINVAL);
            EXPECT(count, 2);
            continue;
        }
        opened++;
        uint64_t length = random_next(&seed) % BYTES;
        unsigned char *bytes = malloc(length + 1); /* of its own, so that a sanitizer sees a step outside */
        noise(bytes, length, &seed);
        decode_all(decoder, bytes, length, BYTES / 8);
        decode_all(decoder, bytes, length, 1);
        free(bytes);
        tm_decoder_close(decoder);
    }
    TRUE(opened > 10000);
    return 0;
}
