/* Range: one aligned run of addresses in which a client maps segments side by side. */
#include <stdlib.h>

#include "internal.h"

struct tm_range {
    char *address;
    uint64_t bytes;
};

int tm_range_reserve(uint64_t bytes, tm_range **range) {
    if (bytes == 0 || bytes > TM_BYTES_MAX) return TM_E_RANGE;
    bytes = tm_round_up(bytes, TM_PAGE_BYTES);
    tm_range *made = malloc(sizeof *made);
    if (made == NULL) return -ENOMEM;
    void *address;
    int status = tm_prim_reserve(bytes, &address);
    if (status < 0) {
        free(made);
        return status;
    }
    *made = (tm_range){address, bytes};
    *range = made;
    return 0;
}

int tm_range_map(tm_range *range, uint64_t offset, int fd, uint64_t length, int mode) {
    static const enum tm_protection protections[] = {
        [TM_MAP_SHARED] = TM_PROTECT_READ, [TM_MAP_COW] = TM_PROTECT_COW, [TM_MAP_FILL] = TM_PROTECT_WRITE};
    if (mode != TM_MAP_SHARED && mode != TM_MAP_COW && mode != TM_MAP_FILL) return -EINVAL;
    if (length == 0 || !tm_within(offset, length, range->bytes)) return TM_E_RANGE;
    if (!tm_is_whole_pages(offset)) return TM_E_ALIGN;
    uint64_t size;
    int status = tm_prim_size(fd, &size);
    if (status < 0) return status;
    if (size < length) return TM_E_SHORT; /* touching a mapping behind the end of its file raises SIGBUS */
    /* A private copy of a reserved page needs another reserved page; without one the writer dies by SIGBUS. */
    if (mode == TM_MAP_COW && tm_prim_is_hugetlb(fd)) return -EOPNOTSUPP;
    return tm_prim_map(range->address + offset, length, fd, 0, protections[mode]);
}

int tm_range_protect(tm_range *range) { return tm_prim_protect_read(range->address, range->bytes); }

void *tm_range_address(const tm_range *range) { return range->address; }

uint64_t tm_range_bytes(const tm_range *range) { return range->bytes; }

void tm_range_release(tm_range *range) {
    if (range == NULL) return;
    tm_prim_unmap(range->address, range->bytes);
    free(range);
}
