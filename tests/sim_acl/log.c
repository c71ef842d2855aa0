/* Log: every call, with the order of its moments, in a ring; and how often each function was called. */
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "sim.h"

enum { KEPT = 1 << 16, NAMES = 512 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct sim_acl_call ring[KEPT];
static uint64_t calls, moments;
static struct {
    const char *name;
    uint64_t calls;
} counts[NAMES]; /* by address, as names are literals: one text may be there several times */

static struct sim_acl_call *kept(uint64_t number) {
    struct sim_acl_call *call = &ring[number % KEPT];
    return number && call->number == number ? call : NULL;
}

static void count(const char *name) {
    size_t at = (uintptr_t)name / 8 % NAMES;
    while (counts[at].name && counts[at].name != name) at = (at + 1) % NAMES;
    counts[at].name = name;
    counts[at].calls++;
}

uint64_t sim_issue(const char *name, const char *detail, aclrtStream stream, uint64_t bytes) {
    int32_t device = sim_current();
    pthread_mutex_lock(&lock);
    uint64_t number = ++calls;
    struct sim_acl_call *call = &ring[number % KEPT];
    *call = (struct sim_acl_call){
        .number = number, .stream = (uintptr_t)stream, .bytes = bytes, .issued = ++moments, .device = device};
    snprintf(call->name, sizeof call->name, "%s", name);
    snprintf(call->detail, sizeof call->detail, "%s", detail);
    count(name);
    pthread_mutex_unlock(&lock);
    return number;
}

void sim_place(uint64_t number, const void *to, const void *from) {
    pthread_mutex_lock(&lock);
    struct sim_acl_call *call = kept(number);
    if (call) {
        call->to = (uintptr_t)to;
        call->from = (uintptr_t)from;
    }
    pthread_mutex_unlock(&lock);
}

void sim_begin(uint64_t number) {
    pthread_mutex_lock(&lock);
    struct sim_acl_call *call = kept(number);
    if (call) call->begun = ++moments;
    pthread_mutex_unlock(&lock);
}

aclError sim_end(uint64_t number, aclError status) {
    pthread_mutex_lock(&lock);
    struct sim_acl_call *call = kept(number);
    if (call) {
        call->ended = ++moments;
        call->status = status;
    }
    pthread_mutex_unlock(&lock);
    return status;
}

uint64_t sim_enter(const char *name, uint64_t bytes) {
    uint64_t number = sim_issue(name, "", NULL, bytes);
    pthread_mutex_lock(&lock);
    struct sim_acl_call *call = kept(number);
    if (call) call->begun = call->issued;
    pthread_mutex_unlock(&lock);
    return number;
}

aclError sim_accept(const char *name) { return sim_end(sim_enter(name, 0), ACL_SUCCESS); }

aclError sim_refuse(const char *name) { return sim_end(sim_enter(name, 0), ACL_NOT_SUPPORTED); }

uint64_t sim_acl_calls(void) {
    pthread_mutex_lock(&lock);
    uint64_t number = calls;
    pthread_mutex_unlock(&lock);
    return number;
}

uint64_t sim_acl_count(const char *name) {
    uint64_t sum = 0;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < NAMES; i++)
        if (counts[i].name && strcmp(counts[i].name, name) == 0) sum += counts[i].calls;
    pthread_mutex_unlock(&lock);
    return sum;
}

uint64_t sim_acl_read(uint64_t after, struct sim_acl_call *into, uint64_t room) {
    uint64_t read = 0;
    pthread_mutex_lock(&lock);
    if (calls > KEPT && after < calls - KEPT) after = calls - KEPT;
    for (uint64_t number = after + 1; number <= calls && read < room; number++) into[read++] = ring[number % KEPT];
    pthread_mutex_unlock(&lock);
    return read;
}
