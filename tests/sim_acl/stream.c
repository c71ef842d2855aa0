/* Streams: queues of tasks, each with a thread that runs them in their order. A device has a default one. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#include "sim.h"

struct stream {
    int32_t device;
    uint64_t mode;    /* what a failed task does to those behind it */
    aclError failure; /* of the first task that failed */
    uint64_t submitted, finished;
    struct sim_task *first, **last;
    bool started, destroyed, dropped;
    unsigned waiting; /* host threads in the midst of waiting for it */
    pthread_cond_t wake;
    struct stream *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t moved;
static struct stream *streams;
static struct stream *defaults[SIM_DEVICES_MAX];

__attribute__((constructor)) static void prepare(void) {
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&moved, &attributes);
    pthread_condattr_destroy(&attributes);
}

void sim_queue_lock(void) { pthread_mutex_lock(&lock); }

void sim_queue_unlock(void) { pthread_mutex_unlock(&lock); }

bool sim_queue_wait(const struct timespec *until) {
    if (until) return pthread_cond_timedwait(&moved, &lock, until) != ETIMEDOUT;
    pthread_cond_wait(&moved, &lock);
    return true;
}

struct timespec sim_time_in(int32_t ms) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    time.tv_sec += ms / 1000;
    time.tv_nsec += ms % 1000 * 1000000L;
    if (time.tv_nsec >= 1000000000L) {
        time.tv_sec++;
        time.tv_nsec -= 1000000000L;
    }
    return time;
}

static struct stream *create(int32_t device) {
    struct stream *stream = calloc(1, sizeof *stream);
    if (!stream) return NULL;
    stream->device = device;
    stream->last = &stream->first;
    pthread_cond_init(&stream->wake, NULL);
    stream->next = streams;
    streams = stream;
    return stream;
}

static struct stream *find(aclrtStream handle) {
    int32_t device = sim_current();
    if (!handle && device >= 0) return defaults[device] ? defaults[device] : (defaults[device] = create(device));
    struct stream *stream = streams;
    while (stream && (stream != handle || stream->destroyed)) stream = stream->next;
    return stream;
}

static aclError stopped(const struct stream *stream) {
    if (stream->dropped) return ACL_INVALID_HANDLE;
    return stream->mode == ON_FAILURE_STOP && stream->failure ? stream->failure : sim_device_lost();
}

/* With the lock, which it gives up while the task runs or waits. */
static aclError perform(struct stream *stream, struct sim_task *task) {
    aclError status = stopped(stream);
    if (task->await) {
        aclError recorded = ACL_SUCCESS;
        sim_begin(task->call);
        while (!status && !sim_event_passed(task->await, task->ticket, &recorded)) {
            sim_queue_wait(NULL);
            status = stopped(stream);
        }
        return status ? status : recorded;
    }
    if (task->record) {
        sim_begin(task->call);
        sim_event_pass(task->record, task->ticket, status ? status : stream->failure);
        return status;
    }
    if (status) return status;
    pthread_mutex_unlock(&lock);
    sim_begin(task->call);
    status = task->run(task);
    pthread_mutex_lock(&lock);
    return status;
}

static void finish(struct stream *stream, struct sim_task *task, aclError status) {
    sim_end(task->call, status);
    if (task->await) sim_event_release(task->await);
    if (task->record) sim_event_release(task->record);
    free(task);
    if (status && !stream->failure) stream->failure = status;
    stream->finished++;
    pthread_cond_broadcast(&moved);
}

static void forget(struct stream *stream) {
    while (stream->waiting) sim_queue_wait(NULL);
    struct stream **at = &streams;
    while (*at != stream) at = &(*at)->next;
    *at = stream->next;
    pthread_cond_destroy(&stream->wake);
    free(stream);
}

static void *work(void *argument) {
    struct stream *stream = argument;
    pthread_mutex_lock(&lock);
    while (!stream->destroyed || stream->first) {
        struct sim_task *task = stream->first;
        if (!task) {
            pthread_cond_wait(&stream->wake, &lock);
            continue;
        }
        stream->first = task->next;
        if (!stream->first) stream->last = &stream->first;
        finish(stream, task, perform(stream, task));
    }
    forget(stream);
    pthread_mutex_unlock(&lock);
    return NULL;
}

static bool start(struct stream *stream) {
    pthread_t thread;
    if (!stream->started && pthread_create(&thread, NULL, work, stream) == 0) {
        pthread_detach(thread);
        stream->started = true;
    }
    return stream->started;
}

static aclError enqueue(aclrtStream handle, struct sim_task task) {
    struct stream *stream = find(handle);
    if (!stream) return handle ? ACL_INVALID_HANDLE : ACL_CONTEXT_NULL;
    if (stopped(stream)) return stopped(stream);
    struct sim_task *copy = start(stream) ? malloc(sizeof *copy) : NULL;
    if (!copy) return ACL_NO_RESOURCE;
    *copy = task;
    copy->next = NULL;
    *stream->last = copy;
    stream->last = &copy->next;
    stream->submitted++;
    pthread_cond_signal(&stream->wake);
    return ACL_SUCCESS;
}

aclError sim_submit(aclrtStream handle, struct sim_task task) {
    pthread_mutex_lock(&lock);
    aclError status = enqueue(handle, task);
    pthread_mutex_unlock(&lock);
    return status ? sim_end(task.call, status) : ACL_SUCCESS;
}

/* The failure of a stream that goes on is told once, of one that stopped always. */
static aclError drain(struct stream *stream, const struct timespec *until) {
    uint64_t target = stream->submitted;
    bool late = false;
    stream->waiting++;
    while (stream->finished < target && !late) late = !sim_queue_wait(until) && stream->finished < target;
    stream->waiting--;
    pthread_cond_broadcast(&moved);
    if (late) return ACL_STREAM_SYNC_TIMEOUT;
    aclError failure = stream->failure;
    if (stream->mode == ON_FAILURE_CONTINUE) stream->failure = ACL_SUCCESS;
    return failure ? failure : sim_device_lost();
}

aclError sim_stream_finish(aclrtStream handle, int32_t timeout_ms) {
    struct timespec until = sim_time_in(timeout_ms < 0 ? 0 : timeout_ms);
    pthread_mutex_lock(&lock);
    struct stream *stream = find(handle);
    aclError status = stream ? drain(stream, timeout_ms < 0 ? NULL : &until) : ACL_INVALID_HANDLE;
    pthread_mutex_unlock(&lock);
    return status;
}

aclError sim_streams_finish(int32_t device) {
    aclError first = ACL_SUCCESS;
    pthread_mutex_lock(&lock);
    for (struct stream *stream = streams; stream; stream = stream->next) {
        if (stream->device != device || stream->destroyed) continue;
        aclError status = drain(stream, NULL);
        if (!first) first = status;
    }
    pthread_mutex_unlock(&lock);
    return first;
}

void sim_streams_heal(void) {
    pthread_mutex_lock(&lock);
    for (struct stream *stream = streams; stream; stream = stream->next) stream->failure = ACL_SUCCESS;
    pthread_mutex_unlock(&lock);
}

static aclError create_for(aclrtStream *handle) {
    int32_t device;
    aclError status = sim_reach(&device);
    if (status) return status;
    pthread_mutex_lock(&lock);
    *handle = create(device);
    pthread_mutex_unlock(&lock);
    return *handle ? ACL_SUCCESS : ACL_NO_RESOURCE;
}

static aclError destroy(aclrtStream handle, bool drop) {
    pthread_mutex_lock(&lock);
    struct stream *stream = handle ? find(handle) : NULL;
    if (stream) {
        stream->destroyed = true;
        stream->dropped = drop;
        pthread_cond_signal(&stream->wake);
        pthread_cond_broadcast(&moved);
        if (!stream->started) forget(stream);
    }
    pthread_mutex_unlock(&lock);
    return stream ? ACL_SUCCESS : ACL_INVALID_HANDLE;
}

API aclError aclrtCreateStream(aclrtStream *stream) {
    uint64_t call = sim_enter(__func__, 0);
    return sim_end(call, create_for(stream));
}

API aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t priority, uint32_t flags) {
    (void)priority, (void)flags;
    uint64_t call = sim_enter(__func__, 0);
    return sim_end(call, create_for(stream));
}

API aclError aclrtDestroyStream(aclrtStream stream) {
    uint64_t call = sim_issue(__func__, "", stream, 0);
    return sim_end(call, destroy(stream, false));
}

API aclError aclrtDestroyStreamForce(aclrtStream stream) {
    uint64_t call = sim_issue(__func__, "", stream, 0);
    return sim_end(call, destroy(stream, true));
}

API aclError aclrtSetStreamFailureMode(aclrtStream handle, uint64_t mode) {
    uint64_t call = sim_issue(__func__, "", handle, 0);
    pthread_mutex_lock(&lock);
    struct stream *stream = handle ? find(handle) : NULL;
    if (stream) stream->mode = mode;
    pthread_mutex_unlock(&lock);
    return sim_end(call, stream ? ACL_SUCCESS : ACL_PARAM_INVALID);
}

API aclError aclrtSynchronizeStream(aclrtStream stream) {
    uint64_t call = sim_issue(__func__, "", stream, 0);
    aclError status = sim_fault(SIM_ACL_DEVICE);
    return sim_end(call, status ? status : sim_stream_finish(stream, -1));
}

API aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout_ms) {
    uint64_t call = sim_issue(__func__, "", stream, 0);
    aclError status = sim_fault(SIM_ACL_DEVICE);
    return sim_end(call, status ? status : sim_stream_finish(stream, timeout_ms));
}

API aclError aclrtStreamQuery(aclrtStream handle, int32_t *status) {
    uint64_t call = sim_issue(__func__, "", handle, 0);
    pthread_mutex_lock(&lock);
    const struct stream *stream = find(handle);
    if (stream) *status = stream->finished < stream->submitted;
    aclError failure = stream ? stopped(stream) : ACL_INVALID_HANDLE;
    pthread_mutex_unlock(&lock);
    return sim_end(call, failure);
}

API aclError aclrtStreamGetId(aclrtStream stream, int32_t *id) {
    *id = (int32_t)((uintptr_t)stream >> 4 & INT32_MAX);
    return sim_accept(__func__);
}
