/* Backing: file systems of our own that hold segment files. */
#include "internal.h"

static int capacity_in_pages(uint64_t capacity, uint64_t *bytes) {
    if (capacity == 0 || capacity > TM_BYTES_MAX) return TM_E_RANGE; /* size=0 would mean "no limit" */
    *bytes = tm_round_up(capacity, TM_PAGE_BYTES);
    return 0;
}

int tm_tmpfs_mount(const char *path, uint64_t capacity) {
    int status = capacity_in_pages(capacity, &capacity);
    return status < 0 ? status : tm_prim_tmpfs_mount(path, capacity);
}

int tm_tmpfs_resize(const char *path, uint64_t capacity) {
    int status = capacity_in_pages(capacity, &capacity);
    return status < 0 ? status : tm_prim_tmpfs_resize(path, capacity);
}

int tm_tmpfs_unmount(const char *path) { return tm_prim_tmpfs_unmount(path); }

int tm_tmpfs_detached(uint64_t capacity, int *dirfd) {
    int status = capacity_in_pages(capacity, &capacity);
    return status < 0 ? status : tm_prim_tmpfs_detached(capacity, dirfd);
}
