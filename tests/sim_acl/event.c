/* Events: places in the order of a stream's work that other streams and the host wait for. An event that a failed or lost
 * stream was to record passes too, and tells the failure to whoever waits. */
#include <stdio.h>
#include <stdlib.h>

#include "sim.h"

struct sim_event {
    unsigned references;
    uint64_t recorded, passed; /* how often it was asked for, which of them were reached */
    aclError status;
    struct timespec at;
};

static struct sim_event *create(void) {
    struct sim_event *event = calloc(1, sizeof *event);
    if (event) event->references = 1;
    return event;
}

void sim_event_pass(struct sim_event *event, uint64_t ticket, aclError status) {
    if (ticket <= event->passed) return;
    event->passed = ticket;
    event->status = status;
    clock_gettime(CLOCK_MONOTONIC, &event->at);
}

bool sim_event_passed(const struct sim_event *event, uint64_t ticket, aclError *status) {
    *status = event->passed >= ticket ? event->status : ACL_SUCCESS;
    return event->passed >= ticket;
}

void sim_event_release(struct sim_event *event) {
    if (--event->references == 0) free(event);
}

static aclError make(aclrtEvent *event, uint32_t flags) {
    int32_t device;
    aclError status = sim_reach(&device);
    if (status) return status;
    if (flags & EVENT_IPC) return ACL_NOT_SUPPORTED;
    *event = create();
    return *event ? ACL_SUCCESS : ACL_NO_RESOURCE;
}

API aclError aclrtCreateEvent(aclrtEvent *event) {
    uint64_t call = sim_enter(__func__, 0);
    return sim_end(call, make(event, 0));
}

API aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flags) {
    uint64_t call = sim_enter(__func__, 0);
    return sim_end(call, make(event, flags));
}

API aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flags) {
    uint64_t call = sim_enter(__func__, 0);
    return sim_end(call, make(event, flags));
}

API aclError aclrtDestroyEvent(aclrtEvent event) {
    sim_queue_lock();
    sim_event_release(event);
    sim_queue_unlock();
    return sim_accept(__func__);
}

static uint64_t issue(const char *name, const void *event, aclrtStream stream) {
    char words[40];
    snprintf(words, sizeof words, "event %p", event);
    return sim_issue(name, words, stream, 0);
}

API aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream) {
    struct sim_event *event = handle;
    struct sim_task task = {.record = event, .call = issue(__func__, event, stream)};
    int32_t device;
    aclError status = sim_reach(&device);
    if (status) return sim_end(task.call, status);
    sim_queue_lock();
    task.ticket = ++event->recorded;
    event->references++;
    sim_queue_unlock();
    status = sim_submit(stream, task);
    if (!status) return status;
    sim_queue_lock();
    sim_event_pass(event, task.ticket, status);
    sim_event_release(event);
    sim_queue_unlock();
    return status;
}

API aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent handle) {
    struct sim_event *event = handle;
    struct sim_task task = {.await = event, .call = issue(__func__, event, stream)};
    int32_t device;
    aclError status = sim_reach(&device);
    if (status) return sim_end(task.call, status);
    sim_queue_lock();
    task.ticket = event->recorded;
    event->references++;
    sim_queue_unlock();
    status = sim_submit(stream, task);
    if (!status) return status;
    sim_queue_lock();
    sim_event_release(event);
    sim_queue_unlock();
    return status;
}

API aclError aclrtResetEvent(aclrtEvent event, aclrtStream stream) {
    return sim_end(issue(__func__, event, stream), ACL_SUCCESS);
}

API aclError aclrtSynchronizeEvent(aclrtEvent handle) {
    struct sim_event *event = handle;
    uint64_t call = issue(__func__, event, NULL);
    aclError status = sim_fault(SIM_ACL_DEVICE);
    if (status) return sim_end(call, status);
    sim_queue_lock();
    uint64_t ticket = event->recorded;
    event->references++;
    while (!sim_event_passed(event, ticket, &status)) sim_queue_wait(NULL);
    sim_event_release(event);
    sim_queue_unlock();
    return sim_end(call, status ? status : sim_device_lost());
}

API aclError aclrtQueryEventStatus(aclrtEvent handle, int32_t *complete) {
    const struct sim_event *event = handle;
    uint64_t call = issue(__func__, event, NULL);
    aclError status = sim_fault(SIM_ACL_DEVICE);
    if (status) return sim_end(call, status);
    sim_queue_lock();
    *complete = sim_event_passed(event, event->recorded, &status);
    sim_queue_unlock();
    return sim_end(call, status ? status : sim_device_lost());
}

API aclError aclrtQueryEventWaitStatus(aclrtEvent event, int32_t *waiting) {
    (void)event;
    *waiting = 0;
    return sim_accept(__func__);
}

API aclError aclrtEventElapsedTime(float *ms, aclrtEvent start, aclrtEvent end) {
    const struct sim_event *from = start, *to = end;
    uint64_t call = sim_enter(__func__, 0);
    sim_queue_lock();
    bool both = from->passed && to->passed;
    if (both)
        *ms = (float)((double)(to->at.tv_sec - from->at.tv_sec) * 1e3 + (double)(to->at.tv_nsec - from->at.tv_nsec) / 1e6);
    sim_queue_unlock();
    return sim_end(call, both ? ACL_SUCCESS : ACL_PARAM_INVALID);
}

API aclError aclrtEventGetTimestamp(aclrtEvent handle, uint64_t *us) {
    const struct sim_event *event = handle;
    uint64_t call = sim_enter(__func__, 0);
    sim_queue_lock();
    bool passed = event->passed > 0;
    if (passed) *us = (uint64_t)event->at.tv_sec * 1000000 + (uint64_t)event->at.tv_nsec / 1000;
    sim_queue_unlock();
    return sim_end(call, passed ? ACL_SUCCESS : ACL_PARAM_INVALID);
}
