/* Copying memory with several threads. */
#include <string.h>

#include "internal.h"

/* Two pages a step: large enough that taking one costs nothing, small enough that threads end together. */
#define COPY_STEP (2 * (uint64_t)TM_PAGE_BYTES)

struct copy {
    char *destination;
    const char *source;
};

static int copy_step(void *argument, uint64_t offset, uint64_t length) {
    struct copy *copy = argument;
    memcpy(copy->destination + offset, copy->source + offset, length);
    return 0;
}

int tm_copy(void *destination, const void *source, uint64_t bytes, unsigned threads) {
    if (bytes > TM_BYTES_MAX) return TM_E_RANGE;
    struct copy copy = {destination, source};
    return tm_split(bytes, COPY_STEP, threads, copy_step, &copy);
}
