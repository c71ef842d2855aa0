/* What callers allocate on a device: memory, and memory in two steps (addresses, and what lies behind them). */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>

#include "sim.h"

struct physical {
    int fd;
    int32_t device;
    uint64_t bytes;
};

/* A file of `bytes` that the board has counted. */
static aclError take_file(int32_t device, uint64_t bytes, int *fd) {
    aclError status = sim_fault(SIM_ACL_MALLOC);
    if (status) return status;
    if (!sim_board_take(device, sim_round_up(bytes, SIM_GRAIN))) return ACL_OUT_OF_MEMORY;
    *fd = sim_file(bytes);
    if (*fd >= 0) return ACL_SUCCESS;
    sim_board_give(device, sim_round_up(bytes, SIM_GRAIN));
    return ACL_NO_RESOURCE;
}

static aclError allocate(void **address, uint64_t bytes) {
    int32_t device;
    int fd;
    if (!bytes) return ACL_PARAM_INVALID;
    aclError status = sim_reach(&device);
    if (!status) status = take_file(device, bytes, &fd);
    if (status) return status;
    *address = sim_memory_open(fd, bytes, device, true);
    if (*address) return ACL_SUCCESS;
    close(fd);
    sim_board_give(device, sim_round_up(bytes, SIM_GRAIN));
    return ACL_NO_RESOURCE;
}

API aclError aclrtMalloc(void **address, size_t bytes, int32_t policy) {
    (void)policy;
    uint64_t call = sim_enter(__func__, bytes);
    return sim_end(call, allocate(address, bytes));
}

API aclError aclrtMallocAlign32(void **address, size_t bytes, int32_t policy) {
    (void)policy;
    uint64_t call = sim_enter(__func__, bytes);
    return sim_end(call, allocate(address, bytes));
}

API aclError aclrtFree(void *address) {
    int fd;
    int32_t device;
    uint64_t bytes = 0;
    bool found = sim_range_file(address, &fd, &bytes, &device);
    uint64_t call = sim_enter(__func__, bytes);
    aclError status = sim_fault(SIM_ACL_DEVICE);
    if (status) return sim_end(call, status);
    return sim_end(call, found && sim_memory_close(address) ? ACL_SUCCESS : ACL_PARAM_INVALID);
}

API aclError aclrtGetMemInfo(int32_t attribute, size_t *left, size_t *all) {
    (void)attribute;
    uint64_t call = sim_enter(__func__, 0);
    int32_t device;
    aclError status = sim_reach(&device);
    if (status) return sim_end(call, status);
    *all = sim_capacity();
    *left = sim_board_free(device);
    return sim_end(call, ACL_SUCCESS);
}

API aclError aclrtReserveMemAddress(void **address, size_t bytes, size_t alignment, void *expected, uint64_t flags) {
    (void)expected, (void)flags;
    uint64_t call = sim_enter(__func__, bytes);
    int32_t device;
    aclError status = sim_reach(&device);
    if (status) return sim_end(call, status);
    *address = sim_reserve(bytes, alignment, device);
    return sim_end(call, *address ? ACL_SUCCESS : ACL_NO_RESOURCE);
}

API aclError aclrtReleaseMemAddress(void *address) {
    uint64_t call = sim_enter(__func__, 0);
    return sim_end(call, sim_unreserve(address) ? ACL_SUCCESS : ACL_PARAM_INVALID);
}

static aclError allocate_physical(aclrtDrvMemHandle *handle, uint64_t bytes, const struct acl_physical_properties *properties) {
    int32_t current;
    int32_t device = (int32_t)properties->location.device;
    if (properties->location.type != LOCATION_DEVICE) return ACL_NOT_SUPPORTED;
    if (!bytes || device < 0 || device >= sim_devices()) return ACL_PARAM_INVALID;
    aclError status = sim_reach(&current);
    if (status) return status;
    struct physical *physical = malloc(sizeof *physical);
    if (!physical) return ACL_NO_RESOURCE;
    *physical = (struct physical){.device = device, .bytes = bytes};
    status = take_file(device, bytes, &physical->fd);
    if (status)
        free(physical);
    else
        *handle = physical;
    return status;
}

API aclError aclrtMallocPhysical(aclrtDrvMemHandle *handle, size_t bytes, const struct acl_physical_properties *properties,
                                 uint64_t flags) {
    (void)flags;
    uint64_t call = sim_enter(__func__, bytes);
    return sim_end(call, allocate_physical(handle, bytes, properties));
}

API aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
    struct physical *physical = handle;
    uint64_t call = sim_enter(__func__, physical->bytes);
    aclError status = sim_fault(SIM_ACL_DEVICE);
    if (status) return sim_end(call, status);
    sim_board_give(physical->device, sim_round_up(physical->bytes, SIM_GRAIN));
    close(physical->fd);
    free(physical);
    return sim_end(call, ACL_SUCCESS);
}

API aclError aclrtMapMem(void *address, size_t bytes, size_t offset, aclrtDrvMemHandle handle, uint64_t flags) {
    (void)flags;
    uint64_t call = sim_enter(__func__, bytes);
    const struct physical *physical = handle;
    if (offset > physical->bytes || bytes > physical->bytes - offset) return sim_end(call, ACL_PARAM_INVALID);
    int fd = fcntl(physical->fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0) return sim_end(call, ACL_NO_RESOURCE);
    if (sim_range_put(address, physical->device, fd, offset, bytes, false)) return sim_end(call, ACL_SUCCESS);
    close(fd);
    return sim_end(call, ACL_PARAM_INVALID);
}

API aclError aclrtUnmapMem(void *address) {
    uint64_t call = sim_enter(__func__, 0);
    return sim_end(call, sim_range_remove(address) ? ACL_SUCCESS : ACL_PARAM_INVALID);
}
