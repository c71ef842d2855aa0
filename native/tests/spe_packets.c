/* Packets of SPE become rows; what is cut off waits, and noise is counted and harmless. */
#include "check.h"

static tm_sample rows[512];
static uint64_t used, count, bad;

#define A8(header, a, b, c, d, e, f, g, h) header, a, b, c, d, e, f, g, h
/* A load of 0x0000ffff89abcdef at 0xffff800011223344, in EL1: 0xa0 in the top byte says non-secure, level 1. */
static const unsigned char load[] = {
    0x00, 0x00,                                              /* padding */
    A8(0xb0, 0x44, 0x33, 0x22, 0x11, 0x00, 0x80, 0xff, 0xa0), /* PC */
    0x64, 0x2a, 0x01, 0x00, 0x00,                            /* context: thread 298 */
    0x49, 0x00,                                              /* a load */
    0x52, 0x16, 0x01,                                        /* events, 16 bits */
    0x99, 0x05, 0x00,                                        /* issue latency 5 */
    0x98, 0x2c, 0x01,                                        /* total latency 300 */
    A8(0xb2, 0xef, 0xcd, 0xab, 0x89, 0xff, 0xff, 0x00, 0x3c), /* VA with tag 0x3c */
    0x9a, 0x02, 0x00,                                        /* translation latency 2 */
    0x43, 0x0e,                                              /* data source */
    A8(0x20, 0xb3, 0x00, 0x10, 0x20, 0x30, 0x04, 0x00, 0x00), 0x80, /* PA by an extended header, non-secure */
    A8(0x71, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08), /* timestamp */
};
static const unsigned char branch[] = {0x4a, 0x01, 0x42, 0x02, A8(0xb1, 1, 2, 3, 4, 5, 6, 0, 0x80), 0x01};

static void reads_a_load(void) {
    OK(tm_spe_decode(load, sizeof load, rows, 512, &used, &count, &bad));
    EXPECT(used, sizeof load);
    EXPECT(count, 1);
    EXPECT(bad, 0);
    EXPECT(rows[0].ip, 0xffff800011223344);
    EXPECT(rows[0].addr, 0x0000ffff89abcdef);
    EXPECT(rows[0].phys_addr, 0x0000000430201000);
    EXPECT(rows[0].time, 0x0807060504030201);
    EXPECT(rows[0].pid, 298);
    EXPECT(rows[0].tid, 298);
    EXPECT(rows[0].id, 0);
    EXPECT(rows[0].transaction, 0x0116);
    EXPECT(rows[0].weight, 300);
    EXPECT(rows[0].weight2, 5);
    EXPECT(rows[0].weight3, 2);
    EXPECT(rows[0].data_src, 0x0e);
    EXPECT(rows[0].cpu, 0);
}

static void fills_the_top_of_kernel_addresses(void) {
    const unsigned char kernel[] = {A8(0xb2, 0, 0, 0, 0, 0, 0x80, 0xff, 0x00),
                                    A8(0xb0, 8, 0, 0, 0, 0, 0x80, 0xff, 0x80), 0x01};
    OK(tm_spe_decode(kernel, sizeof kernel, rows, 512, &used, &count, &bad));
    EXPECT(rows[0].addr, 0xffff800000000000);
    EXPECT(rows[0].ip, 0x00ff800000000008); /* level 0 has no kernel */
}

static void leaves_out_what_has_no_data_address(void) {
    unsigned char stream[sizeof branch + sizeof load];
    memcpy(stream, branch, sizeof branch);
    memcpy(stream + sizeof branch, load, sizeof load);
    OK(tm_spe_decode(stream, sizeof stream, rows, 512, &used, &count, &bad));
    EXPECT(count, 1);
    EXPECT(rows[0].addr, 0x0000ffff89abcdef);
    EXPECT(rows[0].transaction, 0x0116); /* not the branch's */
    OK(tm_spe_decode(stream, sizeof stream, rows, 0, &used, &count, &bad));
    EXPECT(count, 0);
    EXPECT(used, sizeof branch + 2); /* the record that found no room is the next call's */
}

static void waits_for_the_rest(void) {
    for (uint64_t length = 0; length < sizeof load; length++) {
        OK(tm_spe_decode(load, length, rows, 512, &used, &count, &bad));
        EXPECT(count, 0);
        EXPECT(bad, 0);
        EXPECT(used, length < 2 ? length : 2); /* the padding */
    }
}

static void skips_what_is_no_packet(void) {
    unsigned char stream[3 + 2 * sizeof load] = {0xff, 0x22, 0x71 ^ 0x80};
    memcpy(stream + 3, load, sizeof load);
    memcpy(stream + 3 + sizeof load, load, sizeof load);
    OK(tm_spe_decode(stream, sizeof stream, rows, 512, &used, &count, &bad));
    EXPECT(bad, 3);
    EXPECT(count, 2);
    EXPECT(used, sizeof stream);
    const unsigned char aligned[] = {0x23, 0x00, 0x00, 0x00, 0x00, A8(0xb2, 1, 0, 0, 0, 0, 0, 0, 0), 0x01};
    OK(tm_spe_decode(aligned, sizeof aligned, rows, 512, &used, &count, &bad));
    EXPECT(bad, 0);
    EXPECT(count, 1);
}

static void ends_a_record_without_end(void) {
    unsigned char *stream = malloc(1 << 16);
    memset(stream, 0x48, 1 << 16); /* operations for ever */
    OK(tm_spe_decode(stream, 1 << 16, rows, 512, &used, &count, &bad));
    TRUE(used >= (1 << 16) - 2048);
    TRUE(bad > 0);
    free(stream);
}

static void survives_noise(void) {
    uint64_t seed = 17;
    const unsigned char headers[] = {0x00, 0x01, 0x71, 0x42, 0x62, 0x43, 0x64, 0x49,
                                     0x20, 0x23, 0xb0, 0xb2, 0xb3, 0x98};
    for (int round = 0; round < 50000; round++) {
        uint64_t length = random_next(&seed) % 600;
        unsigned char *stream = malloc(length + 1);
        random_fill(stream, length, random_next(&seed));
        for (uint64_t i = 0; i < length; i += 1 + random_next(&seed) % 12)
            stream[i] = headers[random_next(&seed) % sizeof headers];
        OK(tm_spe_decode(stream, length, rows, 512, &used, &count, &bad));
        TRUE(used <= length && bad <= length && count <= length / 10);
        free(stream);
    }
}

int main(void) {
    reads_a_load();
    fills_the_top_of_kernel_addresses();
    leaves_out_what_has_no_data_address();
    waits_for_the_rest();
    skips_what_is_no_packet();
    ends_a_record_without_end();
    survives_noise();
    return 0;
}
