/* What every test shares: an assertion that says what was different, and scratch files that leave nothing behind. */
#ifndef TIERMEM_CHECK_H
#define TIERMEM_CHECK_H
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tiermem.h"

#define PAGE ((uint64_t)TM_PAGE_BYTES)
#define SKIPPED 77

#define EXPECT(actual, expected)                                                                             \
    do {                                                                                                     \
        long long actual_ = (long long)(actual), expected_ = (long long)(expected);                          \
        if (actual_ != expected_) {                                                                          \
            fprintf(stderr, "%s:%d: %s is %lld, not %lld\n", __FILE__, __LINE__, #actual, actual_, expected_); \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)
#define OK(call) EXPECT(call, 0)
#define TRUE(condition) EXPECT(!!(condition), 1)

/* A new directory in `parent`; the test unlinks what it made. */
static inline int scratch_open(char path[64], const char *parent) {
    snprintf(path, 64, "%s/tiermem-test-XXXXXX", parent);
    TRUE(mkdtemp(path) != NULL);
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    TRUE(fd >= 0);
    return fd;
}

static inline uint64_t random_next(uint64_t *state) { /* xorshift64 */
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static inline void random_fill(unsigned char *bytes, uint64_t count, uint64_t seed) {
    for (uint64_t i = 0; i < count; i++) bytes[i] = (unsigned char)random_next(&seed);
}
#endif
