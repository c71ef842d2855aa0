/* Work that fails stops the split, and its status is what the caller gets. */
#include <stdatomic.h>

#include "check.h"
#include "internal.h"

static _Atomic unsigned steps;
static _Atomic uint64_t covered;

static int succeed(void *argument, uint64_t offset, uint64_t length) {
    (void)argument, (void)offset;
    atomic_fetch_add(&covered, length);
    return 0;
}

static int fail_on_third(void *argument, uint64_t offset, uint64_t length) {
    (void)argument, (void)length;
    atomic_fetch_add(&steps, 1);
    return offset == 20 ? -EIO : 0;
}

int main(void) {
    OK(tm_split(1005, 10, 4, succeed, NULL));
    EXPECT(covered, 1005);
    covered = 0;
    OK(tm_split(1000, 1, 1000000, succeed, NULL)); /* with as many threads as there may be */
    EXPECT(covered, 1000);
    EXPECT(tm_split(1000, 10, 1, fail_on_third, NULL), -EIO);
    EXPECT(steps, 3);
    EXPECT(tm_split(1000, 10, 8, fail_on_third, NULL), -EIO);
    return 0;
}
