/* Every call into the operating system, behind functions that a port to another one would rewrite.
 *
 * Owns no state. Functions return 0 or -errno; results leave through the last argument. Interrupted calls are repeated.
 * `pre:` lines are the caller's duty and are not checked here.
 */
#ifndef TIERMEM_PRIM_H
#define TIERMEM_PRIM_H
#include <stdint.h>

typedef struct tm_iovec {
    void *base;
    uint64_t length;
} tm_iovec;

enum tm_protection { TM_PROTECT_READ, TM_PROTECT_WRITE, TM_PROTECT_COW };

uint64_t tm_prim_os_page(void);

/* --- files ------------------------------------------------------------------------------------------------------ */
int tm_prim_create(int dirfd, const char *name, int *fd); /* O_EXCL, mode 0600 */
int tm_prim_create_unlinked(int dirfd, int *fd);          /* has no name, and cannot get one */
int tm_prim_memory_file(const char *label, int hugetlb, int *fd);
int tm_prim_open_read(int dirfd, const char *path, int *fd); /* dirfd < 0: path as it stands; -EINVAL unless regular */
int tm_prim_reopen_read(int fd, int direct, int *again);     /* the same file, whatever its name is by now */
int tm_prim_unlink(int dirfd, const char *name);
int tm_prim_resize(int fd, uint64_t bytes);
int tm_prim_size(int fd, uint64_t *bytes);
int tm_prim_is_hugetlb(int fd); /* 1 or 0 */
int tm_prim_make_immutable(int fd); /* mode 0400; a memory file refuses writes, resizing and writable mappings too */
void tm_prim_close(int fd);

/* Read up to `length` bytes; *got is 0 at the end of the file. */
int tm_prim_read(int fd, void *destination, uint64_t length, uint64_t offset, uint64_t *got);
/* pre: 1 <= count <= TM_PRIM_IOVECS */
#define TM_PRIM_IOVECS 64
int tm_prim_read_vector(int fd, const tm_iovec *vector, unsigned count, uint64_t offset, uint64_t *got);
/* OS pages of [offset, offset+length) that the page cache holds; -ENOSYS before Linux 6.5. pre: length > 0 */
int tm_prim_cached_pages(int fd, uint64_t offset, uint64_t length, uint64_t *pages);

/* --- memory ----------------------------------------------------------------------------------------------------- */
/* Addresses at a multiple of TM_PAGE_BYTES, with nothing behind them. pre: whole pages */
int tm_prim_reserve(uint64_t bytes, void **address);
/* pre: [address, address+bytes) lies in a reservation; address and offset are whole pages */
int tm_prim_map(void *address, uint64_t bytes, int fd, uint64_t offset, enum tm_protection protection);
/* Private memory on 2 MiB OS pages where the kernel has them. pre: as for tm_prim_map */
int tm_prim_map_anonymous(void *address, uint64_t bytes);
void tm_prim_unmap(void *address, uint64_t bytes);
int tm_prim_protect_read(void *address, uint64_t bytes);
/* Allocate and map; the contents stay. -ENOSPC where the file system is full. fd < 0: anonymous.
 * pre: mapped writable, from `offset` of fd; whole OS pages */
int tm_prim_populate(void *address, uint64_t bytes, int fd, uint64_t offset);
/* The same for kernels before 5.14. */
int tm_prim_populate_by_touch(void *address, uint64_t bytes, int fd, uint64_t offset);

/* --- file systems ----------------------------------------------------------------------------------------------- */
int tm_prim_tmpfs_mount(const char *path, uint64_t capacity);
int tm_prim_tmpfs_resize(const char *path, uint64_t capacity);
int tm_prim_tmpfs_unmount(const char *path);
int tm_prim_tmpfs_detached(uint64_t capacity, int *dirfd);
#endif
