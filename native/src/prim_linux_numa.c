/* Linux: nodes of memory: where it lies, moving it, and where new memory is wanted. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "prim.h"

/* <linux/mempolicy.h> */
#define POLICY_PREFERRED 1
#define POLICY_PREFERRED_MANY 5 /* Linux 5.15 */
#define MOVE_OWN (1 << 1)
#define MOVE_ALL (1 << 2)

static int told(long returned) { return returned < 0 ? -errno : (int)returned; }

int tm_prim_nodes(void *const *addresses, unsigned count, int *nodes) {
    return told(syscall(SYS_move_pages, 0, (unsigned long)count, addresses, NULL, nodes, 0));
}

int tm_prim_move(void *const *addresses, unsigned count, const int *wanted, int all, int *status) {
    return told(syscall(SYS_move_pages, 0, (unsigned long)count, addresses, wanted, status, all ? MOVE_ALL : MOVE_OWN));
}

int tm_prim_resident(void *address, uint64_t bytes, int fd, unsigned char *resident) {
    if (!tm_prim_is_hugetlb(fd)) return told(mincore(address, bytes, resident));
    /* For such a file mincore(2) tells what is mapped. */
    struct stat facts;
    if (fstat(fd, &facts) < 0) return -errno;
    memset(resident, facts.st_blocks * 512 >= facts.st_size, bytes / tm_prim_os_page());
    return 0;
}

int tm_prim_prefer(uint64_t nodes, tm_prim_policy *before) {
    *before = (tm_prim_policy){.known = 0};
    if (nodes == 0) return 0;
    int status = told(syscall(SYS_get_mempolicy, &before->mode, before->nodes, TM_PRIM_NODES, NULL, 0ul));
    if (status == -ENOSYS) return 0;
    if (status < 0) return status;
    uint64_t lowest = nodes & -nodes;
    status = told(syscall(SYS_set_mempolicy, POLICY_PREFERRED_MANY, &nodes, 65ul));
    if (status == -EINVAL) status = told(syscall(SYS_set_mempolicy, POLICY_PREFERRED, &lowest, 65ul));
    before->known = status == 0;
    return status == -EINVAL ? -ENODEV : status;
}

void tm_prim_prefer_as(const tm_prim_policy *before) {
    if (before->known) (void)syscall(SYS_set_mempolicy, before->mode, before->nodes, TM_PRIM_NODES);
}
