/* Devices: how many there are, which one a thread uses, what they say of themselves. */
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sim.h"

static _Thread_local int32_t current = -1;
static atomic_bool opened[SIM_DEVICES_MAX];
static char contexts[SIM_DEVICES_MAX]; /* a context is the address of its device's place here */

uint64_t sim_setting(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    if (!text || !*text) return otherwise;
    char *end;
    errno = 0;
    uint64_t value = strtoull(text, &end, 10);
    if (errno || *end || *text == '-') {
        fprintf(stderr, "simulated ACL: %s=%s is not a number\n", name, text);
        abort();
    }
    return value;
}

int32_t sim_devices(void) {
    uint64_t devices = sim_setting("SIM_ACL_DEVICES", 2);
    return devices < SIM_DEVICES_MAX ? (int32_t)devices : SIM_DEVICES_MAX;
}

uint64_t sim_capacity(void) { return sim_setting("SIM_ACL_CAPACITY", UINT64_C(4) << 30); }

int32_t sim_current(void) { return current; }

aclError sim_reach(int32_t *device) {
    *device = current;
    return current < 0 ? ACL_CONTEXT_NULL : sim_fault(SIM_ACL_DEVICE);
}

API aclError aclInit(const char *path) {
    (void)path;
    return sim_accept(__func__);
}

API aclError aclFinalize(void) { return sim_accept(__func__); }

API aclError aclrtGetDeviceCount(uint32_t *count) {
    *count = (uint32_t)sim_devices();
    return sim_end(sim_enter(__func__, 0), *count ? ACL_SUCCESS : ACL_NO_DEVICE);
}

API aclError aclrtSetDevice(int32_t device) {
    uint64_t call = sim_enter(__func__, 0);
    if (device < 0 || device >= sim_devices()) return sim_end(call, ACL_INVALID_DEVICE);
    aclError status = opened[device] ? ACL_SUCCESS : sim_fault(SIM_ACL_DEVICE);
    if (status) return sim_end(call, status);
    opened[device] = true;
    current = device;
    return sim_end(call, ACL_SUCCESS);
}

API aclError aclrtGetDevice(int32_t *device) {
    if (current >= 0) *device = current;
    return sim_end(sim_enter(__func__, 0), current < 0 ? ACL_CONTEXT_NULL : ACL_SUCCESS);
}

API aclError aclrtResetDevice(int32_t device) {
    uint64_t call = sim_enter(__func__, 0);
    if (device < 0 || device >= sim_devices()) return sim_end(call, ACL_INVALID_DEVICE);
    return sim_end(call, sim_streams_finish(device));
}

API aclError aclrtGetCurrentContext(aclrtContext *context) {
    if (current >= 0) *context = &contexts[current];
    return sim_end(sim_enter(__func__, 0), current < 0 ? ACL_CONTEXT_NULL : ACL_SUCCESS);
}

API aclError aclrtSetCurrentContext(aclrtContext context) {
    uint64_t call = sim_enter(__func__, 0);
    for (int32_t device = 0; device < sim_devices(); device++) {
        if (context != &contexts[device]) continue;
        current = device;
        return sim_end(call, ACL_SUCCESS);
    }
    return sim_end(call, ACL_INVALID_HANDLE);
}

API aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    if (flags) *flags = 0;
    *active = device >= 0 && device < sim_devices();
    return sim_accept(__func__);
}

API aclError aclrtSynchronizeDevice(void) {
    uint64_t call = sim_enter(__func__, 0);
    int32_t device;
    aclError status = sim_reach(&device);
    return sim_end(call, status ? status : sim_streams_finish(device));
}

API aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout_ms) {
    (void)timeout_ms; /* all simulated work ends by itself */
    uint64_t call = sim_enter(__func__, 0);
    int32_t device;
    aclError status = sim_reach(&device);
    return sim_end(call, status ? status : sim_streams_finish(device));
}

API const char *aclrtGetSocName(void) { return "Ascend910B1"; }

API const char *aclGetRecentErrMsg(void) { return sim_device_lost() ? "simulated ACL: the device is lost" : ""; }

API aclError aclsysGetCANNVersion(int32_t package, struct acl_package_version *version) {
    (void)package;
    snprintf(version->text, sizeof version->text, "8.5.0");
    return sim_accept(__func__);
}

API aclError aclrtGetDeviceInfo(uint32_t device, int32_t attribute, int64_t *value) {
    (void)attribute;
    *value = SIM_CORES;
    return sim_end(sim_enter(__func__, 0), device < (uint32_t)sim_devices() ? ACL_SUCCESS : ACL_INVALID_DEVICE);
}

API aclError aclGetDeviceCapability(uint32_t device, int32_t attribute, int64_t *value) {
    (void)attribute;
    *value = SIM_CORES;
    return sim_end(sim_enter(__func__, 0), device < (uint32_t)sim_devices() ? ACL_SUCCESS : ACL_INVALID_DEVICE);
}

API aclError aclrtDeviceGetUuid(int32_t device, struct acl_uuid *uuid) {
    memset(uuid, 0, sizeof *uuid);
    snprintf(uuid->bytes, sizeof uuid->bytes, "simulated %d", device);
    return sim_accept(__func__);
}

API aclError aclrtGetLogicDevIdByUserDevId(int32_t device, int32_t *logical) {
    *logical = device;
    return sim_accept(__func__);
}

API aclError aclrtDeviceGetBareTgid(int32_t *process) {
    *process = getpid();
    return sim_accept(__func__);
}

API aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) {
    *can = device != peer;
    return sim_accept(__func__);
}

API aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags) {
    (void)flags;
    return sim_end(sim_enter(__func__, 0), peer >= 0 && peer < sim_devices() ? ACL_SUCCESS : ACL_INVALID_DEVICE);
}

API aclError aclrtGetDeviceUtilizationRate(int32_t device, struct acl_utilization *rates) {
    (void)device;
    *rates = (struct acl_utilization){0};
    return sim_accept(__func__);
}
