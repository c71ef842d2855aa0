/* What the units of the simulated ACL offer each other. Locks are taken in the order queue, memory, board, log; none is held
 * while a copy runs. */
#ifndef SIM_ACL_SIM_H
#define SIM_ACL_SIM_H

#include <stdbool.h>
#include <time.h>

#include "acl.h"
#include "control.h"

enum { SIM_DEVICES_MAX = 8, SIM_CORES = 24 };

/* log.c: a call is issued, begins and ends. */
uint64_t sim_issue(const char *name, const char *detail, aclrtStream stream, uint64_t bytes);
void sim_place(uint64_t call, const void *to, const void *from); /* of a copy */
void sim_begin(uint64_t call);
aclError sim_end(uint64_t call, aclError status);
uint64_t sim_enter(const char *name, uint64_t bytes); /* issue and begin */
aclError sim_accept(const char *name);                /* a setting that changes nothing here */
aclError sim_refuse(const char *name);                /* a feature that is not simulated */

/* fault.c */
aclError sim_fault(enum sim_acl_fault kind); /* counts an event; what it fails with, or 0 */
aclError sim_device_lost(void);              /* what queued work fails with, or 0; counts nothing */
void sim_take_time(uint64_t bytes);          /* as long as a copy takes */
void sim_take_kernel_time(void);

/* device.c */
uint64_t sim_setting(const char *name, uint64_t otherwise); /* a number from the environment */
int32_t sim_devices(void);
uint64_t sim_capacity(void);
int32_t sim_current(void);        /* the thread's device, -1: none */
aclError sim_reach(int32_t *device); /* the thread's device, where it can be used */

/* board.c: how much of each device is taken, by this process and by others. */
bool sim_board_take(int32_t device, uint64_t bytes);
void sim_board_give(int32_t device, uint64_t bytes);
uint64_t sim_board_free(int32_t device);

/* memory.c: reserved device addresses, which the host may not touch, and ranges of them that have bytes. */
enum { SIM_GRAIN = 4096 };
static inline uint64_t sim_round_up(uint64_t bytes, uint64_t grain) { return (bytes + grain - 1) / grain * grain; }
struct sim_range;
void *sim_reserve(uint64_t bytes, uint64_t alignment, int32_t device);
bool sim_unreserve(const void *base);
bool sim_is_device(const void *address, int32_t *device);
int sim_file(uint64_t bytes); /* -1: none to be had */

/* Puts the file's bytes behind reserved addresses; the file is the range's from then on, and where `counted`, what the
 * board has for it. */
bool sim_range_put(char *base, int32_t device, int fd, uint64_t offset, uint64_t bytes, bool counted);
bool sim_range_remove(const void *base); /* copies that run keep the bytes, as a device would */
bool sim_range_file(const void *base, int *fd, uint64_t *bytes, int32_t *device);

void *sim_memory_open(int fd, uint64_t bytes, int32_t device, bool counted); /* reserve and put */
bool sim_memory_close(void *base);

/* Where the bytes of a device address are, and at most how many; NULL: none. To be dropped. */
char *sim_range_hold(const void *address, uint64_t *bytes, struct sim_range **held);
void sim_range_drop(struct sim_range *held);

/* host.c */
bool sim_is_pinned(const void *address, uint64_t bytes);

/* stream.c: a stream's tasks run in their order, on its own thread. */
struct sim_event;
struct sim_task {
    aclError (*run)(struct sim_task *task); /* NULL for the tasks of events */
    uint64_t call;                          /* in the log */
    void *to;
    const void *from;
    uint64_t bytes;
    int32_t kind, value; /* which side is a device's; what to fill with */
    aclrtCallback callback;
    struct sim_event *record, *await;
    uint64_t ticket; /* which record of the event */
    struct sim_task *next;
};
aclError sim_submit(aclrtStream stream, struct sim_task task); /* what the call returns: a refusal is logged too */
aclError sim_stream_finish(aclrtStream stream, int32_t timeout_ms); /* waits for what it has now. -1: for ever */
aclError sim_streams_finish(int32_t device);
void sim_streams_heal(void);

/* One lock for all queues, and one way to wait for any of their tasks to end. False: time is over. */
void sim_queue_lock(void);
void sim_queue_unlock(void);
bool sim_queue_wait(const struct timespec *until);
struct timespec sim_time_in(int32_t ms);

/* kernel.c: a kernel of that name on a stream, asked for by that function. The one call between two of the libraries. */
API aclError sim_acl_launch(const char *function, const char *kernel, aclrtStream stream);

/* event.c, with the queue's lock held */
void sim_event_pass(struct sim_event *event, uint64_t ticket, aclError status);
bool sim_event_passed(const struct sim_event *event, uint64_t ticket, aclError *status);
void sim_event_release(struct sim_event *event);

#endif
