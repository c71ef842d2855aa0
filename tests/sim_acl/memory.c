/* Memory of the devices. A device address is one that the host has reserved and may not touch; the bytes behind it are those of
 * a file of their own, mapped once more at a place that only this unit knows. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "sim.h"

enum { KEPT_APART = 4096 };

struct sim_range {
    char *base, *bytes_at;
    uint64_t bytes;
    int32_t device;
    int fd; /* the range's own, to export it */
    unsigned holds;
    bool removed, counted;
};

struct reserved {
    char *base;
    uint64_t bytes;
    int32_t device;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct sim_range **ranges; /* by address */
static size_t range_count, range_room;
static struct reserved *spaces;
static size_t space_count, space_room;

/* The array with room for one more; NULL, and it is as it was: there is no memory. */
static void *grown(void *array, size_t item_bytes, size_t count, size_t *room) {
    if (count < *room) return array;
    size_t more = *room ? *room * 2 : 64;
    void *moved = realloc(array, more * item_bytes);
    if (moved) *room = more;
    return moved;
}

/* The first range that ends behind the address. */
static size_t position(const char *address) {
    size_t low = 0, high = range_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (ranges[middle]->base + ranges[middle]->bytes <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static struct sim_range *at(const char *address) {
    size_t index = position(address);
    return index < range_count && ranges[index]->base <= address ? ranges[index] : NULL;
}

void *sim_reserve(uint64_t bytes, uint64_t alignment, int32_t device) {
    uint64_t all = sim_round_up(bytes, SIM_GRAIN) + KEPT_APART + alignment;
    char *base = mmap(NULL, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return NULL;
    char *aligned = (char *)sim_round_up((uintptr_t)base, alignment < SIM_GRAIN ? SIM_GRAIN : alignment);
    if (aligned > base) munmap(base, (size_t)(aligned - base));
    pthread_mutex_lock(&lock);
    struct reserved *larger = grown(spaces, sizeof *spaces, space_count, &space_room);
    if (larger) {
        spaces = larger;
        spaces[space_count++] = (struct reserved){aligned, all - (uint64_t)(aligned - base), device};
    }
    pthread_mutex_unlock(&lock);
    if (larger) return aligned;
    munmap(aligned, all - (uint64_t)(aligned - base));
    return NULL;
}

bool sim_unreserve(const void *base) {
    struct reserved found = {0};
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < space_count && !found.base; i++) {
        if (spaces[i].base != base) continue;
        found = spaces[i];
        spaces[i] = spaces[--space_count];
    }
    pthread_mutex_unlock(&lock);
    return found.base && munmap(found.base, found.bytes) == 0;
}

bool sim_is_device(const void *address, int32_t *device) {
    bool found = false;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < space_count && !found; i++) {
        found = (const char *)address >= spaces[i].base && (const char *)address < spaces[i].base + spaces[i].bytes;
        if (found) *device = spaces[i].device;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

int sim_file(uint64_t bytes) {
    int fd = memfd_create("sim_acl", MFD_CLOEXEC);
    if (fd < 0) return -1;
    if (ftruncate(fd, (off_t)sim_round_up(bytes, SIM_GRAIN)) == 0) return fd;
    close(fd);
    return -1;
}

bool sim_range_put(char *base, int32_t device, int fd, uint64_t offset, uint64_t bytes, bool counted) {
    struct sim_range *range = malloc(sizeof *range);
    char *bytes_at = mmap(NULL, sim_round_up(bytes, SIM_GRAIN), PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset);
    pthread_mutex_lock(&lock);
    struct sim_range **larger = grown(ranges, sizeof *ranges, range_count, &range_room);
    size_t index = position(base);
    bool taken = index < range_count && ranges[index]->base < base + bytes;
    bool room = larger && range && bytes_at != MAP_FAILED && !taken;
    if (larger) ranges = larger;
    if (room) {
        *range = (struct sim_range){base, bytes_at, bytes, device, fd, 0, false, counted};
        for (size_t i = range_count++; i > index; i--) ranges[i] = ranges[i - 1];
        ranges[index] = range;
    }
    pthread_mutex_unlock(&lock);
    if (room) return true;
    if (bytes_at != MAP_FAILED) munmap(bytes_at, sim_round_up(bytes, SIM_GRAIN));
    free(range);
    return false;
}

static void discard(struct sim_range *range) {
    munmap(range->bytes_at, sim_round_up(range->bytes, SIM_GRAIN));
    close(range->fd);
    free(range);
}

bool sim_range_remove(const void *base) {
    pthread_mutex_lock(&lock);
    struct sim_range *range = at(base);
    bool found = range && range->base == base;
    if (found) {
        size_t index = position(base);
        for (range_count--; index < range_count; index++) ranges[index] = ranges[index + 1];
        range->removed = true;
    }
    bool last = found && range->holds == 0;
    if (found && range->counted) sim_board_give(range->device, sim_round_up(range->bytes, SIM_GRAIN));
    pthread_mutex_unlock(&lock);
    if (last) discard(range);
    return found;
}

char *sim_range_hold(const void *address, uint64_t *bytes, struct sim_range **held) {
    pthread_mutex_lock(&lock);
    struct sim_range *range = at(address);
    char *found = NULL;
    if (range) {
        uint64_t offset = (uint64_t)((const char *)address - range->base);
        if (*bytes > range->bytes - offset) *bytes = range->bytes - offset;
        range->holds++;
        found = range->bytes_at + offset;
    }
    *held = range;
    pthread_mutex_unlock(&lock);
    return found;
}

void sim_range_drop(struct sim_range *held) {
    if (!held) return;
    pthread_mutex_lock(&lock);
    bool last = --held->holds == 0 && held->removed;
    pthread_mutex_unlock(&lock);
    if (last) discard(held);
}

bool sim_range_file(const void *base, int *fd, uint64_t *bytes, int32_t *device) {
    pthread_mutex_lock(&lock);
    struct sim_range *range = at(base);
    bool found = range && range->base == base;
    if (found) {
        *fd = range->fd;
        *bytes = range->bytes;
        *device = range->device;
    }
    pthread_mutex_unlock(&lock);
    return found;
}

void *sim_memory_open(int fd, uint64_t bytes, int32_t device, bool counted) {
    char *base = sim_reserve(bytes, SIM_GRAIN, device);
    if (base && sim_range_put(base, device, fd, 0, bytes, counted)) return base;
    if (base) sim_unreserve(base);
    return NULL;
}

bool sim_memory_close(void *base) { return sim_range_remove(base) && sim_unreserve(base); }
