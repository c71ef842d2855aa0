/* What tests ask of the simulated ACL and no real one has: faults, delays, figures, the log of calls. All calls are safe from
 * any thread. `tests/sim_acl/control.py` is this file's other half. */
#ifndef SIM_ACL_CONTROL_H
#define SIM_ACL_CONTROL_H

#include "acl.h"

/* One call of an ACL function, or one kernel. `issued`, `begun` and `ended` are places in the one order of all such moments of
 * the process, 0 where the moment has not come: of a call that returns when it is done, issued and begun are the same. */
struct sim_acl_call {
    char name[40];
    char detail[40];
    uint64_t number; /* of the call, from 1 */
    uint64_t stream; /* its handle, 0: none or the device's default one */
    uint64_t bytes;
    uint64_t to, from; /* of copies: addresses */
    uint64_t issued, begun, ended;
    int32_t device; /* -1: none */
    aclError status;
};

/* What can fail. Each kind counts its own events. */
enum sim_acl_fault {
    SIM_ACL_MALLOC,      /* device memory */
    SIM_ACL_MALLOC_HOST, /* pinned host memory, and registering */
    SIM_ACL_COPY_ISSUE,  /* a copy is refused when it is asked for */
    SIM_ACL_COPY,        /* a copy fails while it runs, having copied half */
    SIM_ACL_DEVICE,      /* any call that reaches the device, and all work that is queued there */
    SIM_ACL_FAULTS
};

/* Of the events of one kind from now on, `count` fail with `status`, beginning with the one of number `first` (1: the next). */
API void sim_acl_fail(enum sim_acl_fault kind, uint64_t first, uint64_t count, aclError status);

/* No faults are left, and streams that a fault has stopped run again: a new card, with the old one's memory. */
API void sim_acl_heal(void);

/* How long a copy takes per MiB, and a kernel. At the start: SIM_ACL_DELAY_US and SIM_ACL_KERNEL_US, else 0. */
API void sim_acl_set_delays(uint64_t copy_us_per_mib, uint64_t kernel_us);

API uint64_t sim_acl_device_bytes(int32_t device); /* allocated by this process */
API uint64_t sim_acl_pinned_bytes(void);           /* host memory that is allocated or registered for DMA */
API uint64_t sim_acl_calls(void);                  /* how many there were: the number of the last one */
API uint64_t sim_acl_count(const char *name);      /* calls of one function, never forgotten */

/* Copies at most `room` calls of numbers above `after`, oldest first, and returns how many. The last 65536 are kept. */
API uint64_t sim_acl_read(uint64_t after, struct sim_acl_call *calls, uint64_t room);

#endif
