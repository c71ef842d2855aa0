/* Host memory that a device can reach by itself: allocated for that, or registered. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "sim.h"

struct pinned {
    char *base;
    uint64_t bytes;
    bool allocated;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct pinned *all;
static size_t count, room;

static bool add(struct pinned pinned) {
    pthread_mutex_lock(&lock);
    bool fits = true;
    for (size_t i = 0; i < count && fits; i++)
        fits = pinned.base + pinned.bytes <= all[i].base || all[i].base + all[i].bytes <= pinned.base;
    if (fits && count == room) {
        struct pinned *grown = realloc(all, (room + 64) * sizeof *all);
        fits = grown != NULL;
        if (fits) {
            all = grown;
            room += 64;
        }
    }
    if (fits) all[count++] = pinned;
    pthread_mutex_unlock(&lock);
    return fits;
}

static struct pinned take(const void *base, bool allocated) {
    struct pinned found = {0};
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < count && !found.base; i++) {
        if (all[i].base != base || all[i].allocated != allocated) continue;
        found = all[i];
        all[i] = all[--count];
    }
    pthread_mutex_unlock(&lock);
    return found;
}

bool sim_is_pinned(const void *address, uint64_t bytes) {
    const char *first = address;
    bool found = false;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < count && !found; i++)
        found = first >= all[i].base && bytes <= all[i].bytes && (uint64_t)(first - all[i].base) <= all[i].bytes - bytes;
    pthread_mutex_unlock(&lock);
    return found;
}

uint64_t sim_acl_pinned_bytes(void) {
    uint64_t sum = 0;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < count; i++) sum += all[i].bytes;
    pthread_mutex_unlock(&lock);
    return sum;
}

static aclError reach(void) {
    int32_t device;
    aclError status = sim_reach(&device);
    return status ? status : sim_fault(SIM_ACL_MALLOC_HOST);
}

static aclError allocate(void **address, uint64_t bytes) {
    if (!bytes) return ACL_PARAM_INVALID;
    aclError status = reach();
    if (status) return status;
    void *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return ACL_OUT_OF_MEMORY;
    if (!add((struct pinned){base, bytes, true})) {
        munmap(base, bytes);
        return ACL_NO_RESOURCE;
    }
    *address = base;
    return ACL_SUCCESS;
}

API aclError aclrtMallocHost(void **address, size_t bytes) {
    uint64_t call = sim_enter(__func__, bytes);
    return sim_end(call, allocate(address, bytes));
}

API aclError aclrtMallocHostWithCfg(void **address, uint64_t bytes, const void *settings) {
    (void)settings;
    uint64_t call = sim_enter(__func__, bytes);
    return sim_end(call, allocate(address, bytes));
}

API aclError aclrtFreeHost(void *address) {
    struct pinned found = take(address, true);
    uint64_t call = sim_enter(__func__, found.bytes);
    if (found.base) munmap(found.base, found.bytes);
    return sim_end(call, found.base ? ACL_SUCCESS : ACL_PARAM_INVALID);
}

static aclError enlist(void *address, uint64_t bytes) {
    if (!address || !bytes) return ACL_PARAM_INVALID;
    aclError status = reach();
    if (status) return status;
    return add((struct pinned){address, bytes, false}) ? ACL_SUCCESS : ACL_PARAM_INVALID;
}

API aclError aclrtHostRegister(void *address, uint64_t bytes, int32_t kind, void **on_device) {
    (void)kind;
    uint64_t call = sim_enter(__func__, bytes);
    aclError status = enlist(address, bytes);
    if (!status && on_device) *on_device = address;
    return sim_end(call, status);
}

API aclError aclrtHostRegisterV2(void *address, uint64_t bytes, uint32_t flags) {
    (void)flags;
    uint64_t call = sim_enter(__func__, bytes);
    return sim_end(call, enlist(address, bytes));
}

API aclError aclrtHostUnregister(void *address) {
    struct pinned found = take(address, false);
    return sim_end(sim_enter(__func__, found.bytes), found.base ? ACL_SUCCESS : ACL_PARAM_INVALID);
}

API aclError aclrtPointerGetAttributes(const void *address, struct acl_pointer_attributes *attributes) {
    int32_t device = 0;
    *attributes = (struct acl_pointer_attributes){.location.type = LOCATION_UNREGISTERED, .page_bytes = SIM_GRAIN};
    if (sim_is_device(address, &device))
        attributes->location = (struct acl_location){(uint32_t)device, LOCATION_DEVICE};
    else if (sim_is_pinned(address, 1))
        attributes->location.type = LOCATION_HOST;
    return sim_accept(__func__);
}
