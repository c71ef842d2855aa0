/* Copies: what may be copied where, the copying itself, and the calls that ask for it. */
#include <string.h>

#include "sim.h"

static bool device_has(const char *address, uint64_t bytes) {
    while (bytes) {
        uint64_t part = bytes;
        struct sim_range *held;
        if (!sim_range_hold(address, &part, &held)) return false;
        sim_range_drop(held);
        address += part;
        bytes -= part;
    }
    return true;
}

struct copying {
    int32_t kind; /* what the addresses are, whatever the caller says */
    const char *words;
    aclError status;
};

static int32_t kind_of(const void *to, const void *from) {
    int32_t device;
    bool to_device = sim_is_device(to, &device), from_device = sim_is_device(from, &device);
    return from_device ? (to_device ? COPY_D2D : COPY_D2H) : (to_device ? COPY_H2D : COPY_H2H);
}

static bool to_device(int32_t kind) { return kind == COPY_H2D || kind == COPY_D2D; }

static bool from_device(int32_t kind) { return kind == COPY_D2H || kind == COPY_D2D; }

static struct copying check(const void *to, uint64_t room, const void *from, uint64_t bytes, int32_t asked) {
    const char *pinned[] = {"h2h", "h2d pinned", "d2h pinned", "d2d"};
    const char *pageable[] = {"h2h", "h2d pageable", "d2h pageable", "d2d"};
    int32_t kind = kind_of(to, from);
    const char *words = (sim_is_pinned(to_device(kind) ? from : to, bytes) ? pinned : pageable)[kind];
    bool fits = bytes <= room && (!to_device(kind) || device_has(to, bytes)) && (!from_device(kind) || device_has(from, bytes));
    bool agrees = asked > COPY_BY_ADDRESS ? kind == COPY_D2D : asked == COPY_BY_ADDRESS || asked == kind;
    return (struct copying){kind, words, !fits ? ACL_PARAM_INVALID : !agrees ? ACL_INVALID_MEMORY_TYPE : ACL_SUCCESS};
}

/* Where to copy from or to without touching a device address: a host address is what it is. */
static char *reachable(const char *address, bool on_device, uint64_t *bytes, struct sim_range **held) {
    *held = NULL;
    return on_device ? sim_range_hold(address, bytes, held) : (char *)(uintptr_t)address;
}

static aclError copy_bytes(const struct sim_task *task, uint64_t bytes) {
    char *to = task->to;
    const char *from = task->from;
    while (bytes) {
        uint64_t part = bytes;
        struct sim_range *held_to, *held_from = NULL;
        char *at = reachable(to, to_device(task->kind), &part, &held_to);
        const char *source = at ? reachable(from, from_device(task->kind), &part, &held_from) : NULL;
        if (source) memmove(at, source, part);
        sim_range_drop(held_to);
        sim_range_drop(held_from);
        if (!source) return ACL_DMA_FAILED; /* it was freed while the copy was on its way */
        to += part;
        from += part;
        bytes -= part;
    }
    return ACL_SUCCESS;
}

static aclError copy(struct sim_task *task) {
    sim_take_time(task->bytes);
    aclError fault = sim_fault(SIM_ACL_COPY);
    if (!fault) fault = sim_device_lost();
    aclError status = copy_bytes(task, fault ? task->bytes / 2 : task->bytes);
    return fault ? fault : status;
}

static aclError fill(struct sim_task *task) {
    char *to = task->to;
    for (uint64_t left = task->bytes; left;) {
        uint64_t part = left;
        struct sim_range *held;
        char *at = reachable(to, to_device(task->kind), &part, &held);
        if (at) memset(at, task->value, part);
        sim_range_drop(held);
        if (!at) return ACL_DMA_FAILED;
        to += part;
        left -= part;
    }
    return ACL_SUCCESS;
}

static aclError permit(aclError checked) {
    int32_t device;
    aclError status = sim_reach(&device);
    if (!status) status = checked;
    return status ? status : sim_fault(SIM_ACL_COPY_ISSUE);
}

API aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, int32_t kind) {
    struct copying copying = check(to, room, from, bytes, kind);
    struct sim_task task = {.to = to, .from = from, .bytes = bytes, .kind = copying.kind};
    task.call = sim_issue(__func__, copying.words, NULL, bytes);
    sim_place(task.call, to, from);
    sim_begin(task.call);
    aclError status = permit(copying.status);
    return sim_end(task.call, status ? status : copy(&task));
}

static aclError copy_later(const char *name, void *to, size_t room, const void *from, size_t bytes, int32_t kind,
                           aclrtStream stream) {
    struct copying copying = check(to, room, from, bytes, kind);
    struct sim_task task = {.run = copy, .to = to, .from = from, .bytes = bytes, .kind = copying.kind};
    task.call = sim_issue(name, copying.words, stream, bytes);
    sim_place(task.call, to, from);
    aclError status = permit(copying.status);
    return status ? sim_end(task.call, status) : sim_submit(stream, task);
}

API aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, int32_t kind, aclrtStream stream) {
    return copy_later(__func__, to, room, from, bytes, kind, stream);
}

/* As its documentation says, it is asynchronous for memory that was allocated for that and synchronous for all other. */
API aclError aclrtMemcpyAsyncWithCondition(void *to, size_t room, const void *from, size_t bytes, int32_t kind,
                                           aclrtStream stream) {
    int32_t device;
    bool later = (sim_is_device(to, &device) || sim_is_pinned(to, bytes)) &&
                 (sim_is_device(from, &device) || sim_is_pinned(from, bytes));
    aclError status = copy_later(__func__, to, room, from, bytes, kind, stream);
    return status || later ? status : sim_stream_finish(stream, -1);
}

API aclError aclrtMemcpyBatchAsync(void **to, size_t *rooms, void **from, size_t *bytes, size_t count, void *attributes,
                                   size_t *indexes, size_t attribute_count, size_t *failed, aclrtStream stream) {
    (void)attributes, (void)indexes, (void)attribute_count;
    *failed = SIZE_MAX;
    for (size_t i = 0; i < count; i++) {
        aclError status = copy_later(__func__, to[i], rooms[i], from[i], bytes[i], COPY_BY_ADDRESS, stream);
        if (!status) continue;
        *failed = i;
        return status;
    }
    return ACL_SUCCESS;
}

static struct sim_task filling(void *to, size_t room, int32_t value, size_t bytes, aclError *status) {
    int32_t device;
    *status = sim_reach(&device);
    struct sim_task task = {.run = fill, .to = to, .bytes = bytes, .value = value, .kind = kind_of(to, to)};
    bool fits = bytes <= room && (!to_device(task.kind) || device_has(to, bytes));
    if (!*status && !fits) *status = ACL_PARAM_INVALID;
    return task;
}

API aclError aclrtMemset(void *to, size_t room, int32_t value, size_t bytes) {
    uint64_t call = sim_enter(__func__, bytes);
    aclError status;
    struct sim_task task = filling(to, room, value, bytes, &status);
    return sim_end(call, status ? status : fill(&task));
}

API aclError aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t bytes, aclrtStream stream) {
    aclError status;
    struct sim_task task = filling(to, room, value, bytes, &status);
    task.call = sim_issue(__func__, "", stream, bytes);
    return status ? sim_end(task.call, status) : sim_submit(stream, task);
}
