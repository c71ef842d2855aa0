/* Faults that tests ask for, and how long simulated work takes. */
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "sim.h"

struct plan {
    uint64_t seen, first, count;
    aclError status;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct plan plans[SIM_ACL_FAULTS];
static atomic_uint_fast64_t copy_us_per_mib, kernel_us;

static aclError outcome(const struct plan *plan) {
    return plan->seen >= plan->first && plan->seen - plan->first < plan->count ? plan->status : ACL_SUCCESS;
}

aclError sim_fault(enum sim_acl_fault kind) {
    pthread_mutex_lock(&lock);
    plans[kind].seen++;
    aclError status = outcome(&plans[kind]);
    pthread_mutex_unlock(&lock);
    return status;
}

aclError sim_device_lost(void) {
    pthread_mutex_lock(&lock);
    aclError status = outcome(&plans[SIM_ACL_DEVICE]);
    pthread_mutex_unlock(&lock);
    return status;
}

void sim_acl_fail(enum sim_acl_fault kind, uint64_t first, uint64_t count, aclError status) {
    pthread_mutex_lock(&lock);
    if (kind < SIM_ACL_FAULTS && first) plans[kind] = (struct plan){.first = first, .count = count, .status = status};
    pthread_mutex_unlock(&lock);
}

void sim_acl_heal(void) {
    pthread_mutex_lock(&lock);
    for (int kind = 0; kind < SIM_ACL_FAULTS; kind++) plans[kind] = (struct plan){0};
    pthread_mutex_unlock(&lock);
    sim_streams_heal();
}

void sim_acl_set_delays(uint64_t copy, uint64_t kernel) {
    copy_us_per_mib = copy;
    kernel_us = kernel;
}

__attribute__((constructor)) static void take_settings(void) {
    sim_acl_set_delays(sim_setting("SIM_ACL_DELAY_US", 0), sim_setting("SIM_ACL_KERNEL_US", 0));
}

static void sleep_ns(uint64_t ns) {
    struct timespec left = {.tv_sec = (time_t)(ns / 1000000000), .tv_nsec = (long)(ns % 1000000000)};
    while (ns && nanosleep(&left, &left)) continue;
}

void sim_take_time(uint64_t bytes) { sleep_ns((uint64_t)((double)bytes / (1 << 20) * (double)copy_us_per_mib * 1000)); }

void sim_take_kernel_time(void) { sleep_ns(kernel_us * 1000); }
