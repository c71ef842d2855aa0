/* Linux: perf_event_open(2) and the memory that it shares. Chooses no event, and reads no record. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/perf_event.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "prim.h"
#include "tiermem.h"

/* Of newer kernels than the headers that we are built with. */
#define FORMAT_ID 4u
#define FORMAT_LOST 16u /* Linux 6.0 */
#define CONFIG3_OFFSET 128

/* The attributes with config3 (Linux 6.3) at their end; older kernels take the longer structure while it is 0. */
typedef union {
    struct perf_event_attr attr;
    unsigned char bytes[CONFIG3_OFFSET + sizeof(uint64_t)];
} attributes;
_Static_assert(offsetof(struct perf_event_attr, sig_data) + sizeof(uint64_t) == CONFIG3_OFFSET, "config3 comes next");

static int status_of(long returned) { return returned < 0 ? -errno : 0; }

static void describe(const tm_event *event, uint64_t bytes, uint64_t aux_bytes, attributes *made) {
    memset(made, 0, sizeof *made);
    struct perf_event_attr *attr = &made->attr;
    memcpy(made->bytes + CONFIG3_OFFSET, &event->config3, sizeof event->config3);
    attr->size = CONFIG3_OFFSET + sizeof event->config3;
    attr->type = event->type;
    attr->config = event->config;
    attr->config1 = event->config1;
    attr->config2 = event->config2;
    attr->bp_type = event->breakpoint_type;
    attr->sample_period = event->period;
    attr->sample_type = event->sample_type;
    attr->read_format = FORMAT_ID | FORMAT_LOST;
    attr->precise_ip = event->precise & 3;
    attr->disabled = 1;
    /* Some devices (IBS) exclude nothing and refuse each of these bits, so that they come together or not at all. */
    attr->exclude_kernel = attr->exclude_hv = (event->flags & TM_EVENT_EXCLUDE_KERNEL) != 0;
    attr->inherit = (event->flags & TM_EVENT_INHERIT) != 0;
    attr->enable_on_exec = (event->flags & TM_EVENT_ON_EXEC) != 0;
    attr->use_clockid = (event->flags & TM_EVENT_MONOTONIC) != 0;
    attr->clockid = attr->use_clockid ? CLOCK_MONOTONIC : 0;
    if (event->flags & TM_EVENT_SIDEBAND)
        attr->mmap = attr->mmap2 = attr->comm = attr->comm_exec = attr->task = attr->sample_id_all = 1;
    attr->watermark = 1;
    attr->wakeup_watermark = (uint32_t)(bytes / 4 < UINT32_MAX ? bytes / 4 : UINT32_MAX);
    attr->aux_watermark = (uint32_t)(aux_bytes / 4 < UINT32_MAX ? aux_bytes / 4 : UINT32_MAX);
}

static int event_open(attributes *wanted, int32_t pid, int32_t cpu, int leader, int *fd) {
    long made = syscall(SYS_perf_event_open, wanted, pid, cpu, leader, PERF_FLAG_FD_CLOEXEC);
    if (made < 0 && errno == EINVAL) { /* for an unknown read format, or for a fault that the second try finds too */
        wanted->attr.read_format = FORMAT_ID;
        made = syscall(SYS_perf_event_open, wanted, pid, cpu, leader, PERF_FLAG_FD_CLOEXEC);
    }
    if (made < 0) return -errno;
    *fd = (int)made;
    return 0;
}

static int map(int fd, uint64_t bytes, uint64_t aux_bytes, tm_prim_perf *perf) {
    uint64_t total = tm_prim_os_page() + bytes;
    void *mapping = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapping == MAP_FAILED) return -errno;
    struct perf_event_mmap_page *control = mapping;
    perf->mapping = mapping;
    perf->records = (tm_buffer){(unsigned char *)mapping + tm_prim_os_page(), bytes, (uint64_t *)&control->data_head,
                                (uint64_t *)&control->data_tail};
    if (aux_bytes == 0) return 0;
    control->aux_offset = total;
    control->aux_size = aux_bytes;
    mapping = mmap(NULL, aux_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)total);
    if (mapping == MAP_FAILED) return -errno;
    perf->aux_mapping = mapping;
    perf->aux = (tm_buffer){mapping, aux_bytes, (uint64_t *)&control->aux_head, (uint64_t *)&control->aux_tail};
    return 0;
}

int tm_prim_perf_open(const tm_event *event, int32_t pid, int32_t cpu, int leader, uint64_t bytes, uint64_t aux_bytes,
                      tm_prim_perf *perf) {
    attributes wanted;
    describe(event, bytes, aux_bytes, &wanted);
    memset(perf, 0, sizeof *perf);
    int status = event_open(&wanted, pid, cpu, leader, &perf->fd);
    if (status < 0) return status;
    status = map(perf->fd, bytes, aux_bytes, perf);
    if (status < 0) tm_prim_perf_close(perf);
    return status;
}

int tm_prim_perf_enable(int fd) { return status_of(ioctl(fd, PERF_EVENT_IOC_ENABLE, 0)); }

int tm_prim_perf_disable(int fd) { return status_of(ioctl(fd, PERF_EVENT_IOC_DISABLE, 0)); }

int tm_prim_perf_count(int fd, uint64_t *id, uint64_t *value, uint64_t *lost) {
    uint64_t values[3]; /* value, id, lost */
    ssize_t got;
    do {
        got = read(fd, values, sizeof values);
    } while (got < 0 && errno == EINTR);
    if (got < 0) return -errno;
    if ((size_t)got < 2 * sizeof *values) return -EIO; /* the kernel gave the event up */
    *value = values[0];
    *id = values[1];
    *lost = (size_t)got == sizeof values ? values[2] : UINT64_MAX;
    return 0;
}

void tm_prim_perf_close(tm_prim_perf *perf) {
    if (perf->aux_mapping != NULL) tm_prim_unmap(perf->aux_mapping, perf->aux.bytes);
    if (perf->mapping != NULL) tm_prim_unmap(perf->mapping, tm_prim_os_page() + perf->records.bytes);
    tm_prim_close(perf->fd);
}
