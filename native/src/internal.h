/* What the files of the core share among themselves: page arithmetic and splitting work over threads. */
#ifndef TIERMEM_INTERNAL_H
#define TIERMEM_INTERNAL_H
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>

#include "prim.h"
#include "tiermem.h"

/* Sizes and offsets stay below this, so that sums of two, rounded up, neither wrap nor leave off_t. */
#define TM_BYTES_MAX (UINT64_C(1) << 60)
#define TM_THREADS_MAX 64u

static inline bool tm_is_whole_pages(uint64_t bytes) { return bytes % TM_PAGE_BYTES == 0; }

/* pre: bytes <= TM_BYTES_MAX */
static inline uint64_t tm_round_up(uint64_t bytes, uint64_t unit) { return (bytes + unit - 1) / unit * unit; }

/* Does [offset, offset+length) lie in [0, bytes)? Never overflows. */
static inline bool tm_within(uint64_t offset, uint64_t length, uint64_t bytes) {
    return offset <= bytes && length <= bytes - offset;
}

static inline uint64_t tm_min(uint64_t a, uint64_t b) { return a < b ? a : b; }
static inline uint64_t tm_max(uint64_t a, uint64_t b) { return a > b ? a : b; }

/* Work on [offset, offset+length): 0 or a negative status. Called by several threads at once. */
typedef int tm_work(void *argument, uint64_t offset, uint64_t length);

/* Cut [0, bytes) into steps and let up to `threads` threads, the caller among them, take them in ascending order.
 * Returns the first failure, after which no further step begins. */
int tm_split(uint64_t bytes, uint64_t step, unsigned threads, tm_work *work, void *argument);

/* tm_pagemap_open for a kernel that may lack PAGEMAP_SCAN, or process_madvise on a process's own memory. */
int tm_pagemap_open_as(bool scans, bool vectored, tm_pagemap **pagemap);
/* What the touch of this page costs after it was unmapped; does both. -EAGAIN: it cannot be unmapped; -EINVAL before
 * Linux 5.14. pre: as for tm_pagemap_zap */
int tm_pagemap_fault_ns(tm_pagemap *pagemap, uint64_t address, uint32_t page, uint64_t *ns);
/* One turn of a sampler: looks at the pages of `was` and of `due` (each ascending), then unmaps those of `due` that are
 * mapped and not private. In between it times the touch of one of these, if `fault_ns` is not NULL; 0: there was none
 * that could be timed. */
int tm_pagemap_turn(tm_pagemap *pagemap, uint64_t address, const uint32_t *was, uint32_t was_count, uint16_t *was_state,
                    const uint32_t *due, uint32_t due_count, uint16_t *due_state, uint8_t *due_done, uint64_t *fault_ns);
#endif
