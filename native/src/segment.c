/* Segment: one shared-memory file in whole pages, and its pool's mapping of it. Never unlinks a finished file. */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

/* Short enough that the threads end together on a segment of a few pages. */
#define PREFAULT_STEP (4 * (uint64_t)TM_PAGE_BYTES)

struct tm_segment {
    char *address;
    uint64_t bytes;
    int fd;
    bool sealed;
    pthread_rwlock_t sealing; /* guards `sealed`; held for reading while memory is written to */
};

static int segment_new(int fd, uint64_t bytes, bool sealed, tm_segment **segment) {
    tm_segment *made = malloc(sizeof *made);
    if (made == NULL) return -ENOMEM;
    void *address;
    int status = tm_prim_reserve(bytes, &address);
    if (status == 0) {
        status = tm_prim_map(address, bytes, fd, 0, sealed ? TM_PROTECT_READ : TM_PROTECT_WRITE);
        if (status < 0) tm_prim_unmap(address, bytes);
    }
    if (status < 0) {
        free(made);
        return status;
    }
    *made = (tm_segment){.address = address, .bytes = bytes, .fd = fd, .sealed = sealed};
    pthread_rwlock_init(&made->sealing, NULL);
    *segment = made;
    return 0;
}

static int check_size(uint64_t bytes) {
    if (bytes == 0 || bytes > TM_BYTES_MAX) return TM_E_RANGE;
    return tm_is_whole_pages(bytes) ? 0 : TM_E_ALIGN;
}

int tm_segment_create(int dirfd, const char *name, uint64_t bytes, int flags, tm_segment **segment) {
    bool hugetlb = flags == TM_SEGMENT_HUGETLB;
    if ((flags != 0 && !hugetlb) || strchr(name, '/') != NULL) return -EINVAL;
    int status = check_size(bytes);
    if (status < 0) return status;
    int fd;
    status = dirfd < 0 ? tm_prim_memory_file(name, hugetlb, &fd) : tm_prim_create(dirfd, name, &fd);
    if (status < 0) return status;
    status = tm_prim_resize(fd, bytes);
    if (status == 0) status = segment_new(fd, bytes, false, segment);
    if (status < 0) {
        tm_prim_close(fd);
        if (dirfd >= 0) (void)tm_prim_unlink(dirfd, name);
    }
    return status;
}

int tm_segment_open(int dirfd, const char *name, uint64_t bytes, tm_segment **segment) {
    if (dirfd < 0 || strchr(name, '/') != NULL) return -EINVAL;
    int status = check_size(bytes);
    if (status < 0) return status;
    int fd;
    status = tm_prim_open_read(dirfd, name, &fd);
    if (status < 0) return status;
    uint64_t size;
    status = tm_prim_size(fd, &size);
    if (status == 0 && size != bytes) status = TM_E_SHORT;
    if (status == 0) status = segment_new(fd, bytes, true, segment);
    if (status < 0) tm_prim_close(fd);
    return status;
}

void *tm_segment_address(const tm_segment *segment) { return segment->address; }

uint64_t tm_segment_bytes(const tm_segment *segment) { return segment->bytes; }

int tm_segment_fd(const tm_segment *segment) { return segment->fd; }

struct prefault {
    tm_segment *segment;
    uint64_t offset;
};

static int prefault_step(void *argument, uint64_t offset, uint64_t length) {
    struct prefault *prefault = argument;
    offset += prefault->offset;
    return tm_prim_populate(prefault->segment->address + offset, length, prefault->segment->fd, offset);
}

int tm_segment_prefault(tm_segment *segment, uint64_t offset, uint64_t length, unsigned threads, uint64_t nodes) {
    if (!tm_within(offset, length, segment->bytes)) return TM_E_RANGE;
    uint64_t start = offset / TM_PAGE_BYTES * TM_PAGE_BYTES; /* whole pages: those that the part lies in */
    struct prefault prefault = {segment, start};
    length = tm_round_up(offset + length, TM_PAGE_BYTES) - start;
    tm_prim_policy before;
    int status = tm_prim_prefer(nodes, &before); /* the threads of the split inherit it */
    if (status < 0) return status;
    pthread_rwlock_rdlock(&segment->sealing);
    status = segment->sealed ? TM_E_SEALED : tm_split(length, PREFAULT_STEP, threads, prefault_step, &prefault);
    pthread_rwlock_unlock(&segment->sealing);
    tm_prim_prefer_as(&before);
    return status;
}

int tm_segment_seal(tm_segment *segment) {
    pthread_rwlock_wrlock(&segment->sealing);
    int status = 0;
    if (!segment->sealed) {
        status = tm_prim_protect_read(segment->address, segment->bytes);
        if (status == 0) segment->sealed = true;
        if (status == 0) status = tm_prim_make_immutable(segment->fd);
    }
    pthread_rwlock_unlock(&segment->sealing);
    return status;
}

int tm_segment_share(const tm_segment *segment, int *fd) { return tm_prim_reopen_read(segment->fd, 0, fd); }

int tm_segment_lend(tm_segment *segment, int *fd) {
    pthread_rwlock_rdlock(&segment->sealing);
    int status = segment->sealed ? TM_E_SEALED : tm_prim_reopen_write(segment->fd, fd);
    pthread_rwlock_unlock(&segment->sealing);
    return status;
}

void tm_segment_close(tm_segment *segment) {
    if (segment == NULL) return;
    tm_prim_unmap(segment->address, segment->bytes);
    tm_prim_close(segment->fd);
    pthread_rwlock_destroy(&segment->sealing);
    free(segment);
}
