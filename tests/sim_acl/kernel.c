/* Kernels: they take their place and their time on a stream and compute nothing. Host functions on streams do run. */
#include <time.h>

#include "sim.h"

static aclError pass_time(struct sim_task *task) {
    (void)task;
    sim_take_kernel_time();
    return ACL_SUCCESS;
}

static aclError call_back(struct sim_task *task) {
    task->callback(task->to);
    return ACL_SUCCESS;
}

aclError sim_acl_launch(const char *function, const char *kernel, aclrtStream stream) {
    struct sim_task task = {.run = pass_time, .call = sim_issue(function, kernel, stream, 0)};
    int32_t device;
    aclError status = sim_reach(&device);
    return status ? sim_end(task.call, status) : sim_submit(stream, task);
}

API aclError rtKernelLaunch(const void *function, uint32_t blocks, void *arguments, uint32_t bytes, void *memory,
                            aclrtStream stream) {
    (void)function, (void)blocks, (void)arguments, (void)bytes, (void)memory;
    return sim_acl_launch(__func__, "", stream);
}

API aclError aclrtLaunchKernelWithHostArgs(void *function, uint32_t blocks, aclrtStream stream, void *settings,
                                           void *arguments, size_t bytes, void *places, size_t place_count) {
    (void)function, (void)blocks, (void)settings, (void)arguments, (void)bytes, (void)places, (void)place_count;
    return sim_acl_launch(__func__, "", stream);
}

static aclError launch_host(const char *name, aclrtCallback callback, void *data, aclrtStream stream) {
    struct sim_task task = {.run = call_back, .callback = callback, .to = data};
    task.call = sim_issue(name, "host function", stream, 0);
    int32_t device;
    aclError status = sim_reach(&device);
    return status ? sim_end(task.call, status) : sim_submit(stream, task);
}

API aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtCallback callback, void *data) {
    return launch_host(__func__, callback, data, stream);
}

API aclError aclrtLaunchCallback(aclrtCallback callback, void *data, int32_t blocks, aclrtStream stream) {
    (void)blocks; /* the stream waits for it either way */
    return launch_host(__func__, callback, data, stream);
}

API aclError aclrtSubscribeReport(uint64_t thread, aclrtStream stream) {
    (void)thread, (void)stream;
    return sim_accept(__func__);
}

API aclError aclrtUnSubscribeReport(uint64_t thread, aclrtStream stream) {
    (void)thread, (void)stream;
    return sim_accept(__func__);
}

/* Host functions run on their streams' threads, so that a thread that offers itself for them has nothing to do. */
API aclError aclrtProcessReport(int32_t timeout_ms) {
    struct timespec pause = {.tv_nsec = 10000000};
    if (timeout_ms) nanosleep(&pause, NULL);
    return sim_end(sim_enter(__func__, 0), ACL_REPORT_TIMEOUT);
}

API aclError rtDevBinaryRegister(const void *binary, void **handle) {
    *handle = (void *)(uintptr_t)binary;
    return sim_accept(__func__);
}

API aclError rtFunctionRegister(void *binary, const void *stub, const char *name, const void *info, uint32_t mode) {
    (void)binary, (void)stub, (void)name, (void)info, (void)mode;
    return sim_accept(__func__);
}

API aclError aclrtBinaryLoadFromData(const void *data, size_t bytes, const void *options, void **handle) {
    (void)bytes, (void)options;
    *handle = (void *)(uintptr_t)data;
    return sim_accept(__func__);
}

API aclError aclrtBinaryGetFunction(void *binary, const char *name, void **function) {
    (void)name;
    *function = binary;
    return sim_accept(__func__);
}

API aclError aclrtGetFunctionAddr(void *function, void **cube, void **vector) {
    if (cube) *cube = function;
    if (vector) *vector = function;
    return sim_accept(__func__);
}
