/* Splitting work over threads that live as long as one call. */
#include "internal.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>

struct split {
    uint64_t bytes, step;
    tm_work *work;
    void *argument;
    _Atomic uint64_t next; /* start of the first step that nobody has taken */
    _Atomic int status;    /* the first failure */
};

static void *take_steps(void *argument) {
    struct split *split = argument;
    while (atomic_load(&split->status) == 0) {
        uint64_t offset = atomic_fetch_add(&split->next, split->step);
        if (offset >= split->bytes) break;
        int status = split->work(split->argument, offset, tm_min(split->step, split->bytes - offset));
        int none = 0;
        if (status < 0) atomic_compare_exchange_strong(&split->status, &none, status);
    }
    return NULL;
}

int tm_split(uint64_t bytes, uint64_t step, unsigned threads, tm_work *work, void *argument) {
    struct split split = {.bytes = bytes, .step = step, .work = work, .argument = argument};
    pthread_t others[TM_THREADS_MAX];
    uint64_t steps = bytes / step + (bytes % step > 0);
    uint64_t wanted = tm_min(tm_min(threads, TM_THREADS_MAX), steps);
    unsigned started = 0;
    /* Signals are for the threads of whoever called us. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (started + 1 < wanted && pthread_create(&others[started], NULL, take_steps, &split) == 0) started++;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    take_steps(&split); /* with no thread to be had, everything happens here */
    while (started > 0) pthread_join(others[--started], NULL);
    return atomic_load(&split.status);
}
