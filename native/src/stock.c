/* Stock: prefaulted memory kept ahead of need, as one unlinked file that fill grows and take shrinks.
 *
 * What take frees, the kernel hands to the next who asks; the host keeps its memory behind it, so that touching it
 * again costs the zeroing only, several times less than touching fresh memory.
 */
#include <pthread.h>
#include <stdlib.h>

#include "internal.h"

/* How much memory a take may have to wait for. */
#define FILL_STEP ((uint64_t)32 << 20)

struct tm_stock {
    int fd;
    pthread_mutex_t lock;    /* guards all below */
    pthread_cond_t changed;
    uint64_t bytes;          /* prefaulted; the file is as long, but for the step that is being filled */
    bool filling;            /* a step is being filled: its filler alone may resize the file */
    unsigned takers;         /* waiting; they go before the next step */
};

int tm_stock_open(int dirfd, int flags, tm_stock **stock) {
    bool hugetlb = flags == TM_SEGMENT_HUGETLB;
    if (flags != 0 && !hugetlb) return -EINVAL;
    tm_stock *made = calloc(1, sizeof *made);
    if (made == NULL) return -ENOMEM;
    int status = dirfd < 0 ? tm_prim_memory_file("tiermem-stock", hugetlb, &made->fd)
                           : tm_prim_create_unlinked(dirfd, &made->fd);
    if (status < 0) {
        free(made);
        return status;
    }
    pthread_mutex_init(&made->lock, NULL);
    pthread_cond_init(&made->changed, NULL);
    *stock = made;
    return 0;
}

struct part {
    char *address;
    int fd;
    uint64_t offset; /* of the file */
};

static int populate(void *argument, uint64_t offset, uint64_t length) {
    struct part *part = argument;
    return tm_prim_populate(part->address + offset, length, part->fd, part->offset + offset);
}

/* Grow the file from `start` to `start + bytes`, prefaulted; on failure it has its old length.
 * pre: the caller is the one who set `filling` */
static int grow(int fd, uint64_t start, uint64_t bytes, unsigned threads) {
    void *address;
    int status = tm_prim_reserve(bytes, &address);
    if (status < 0) return status;
    struct part part = {address, fd, start};
    status = tm_prim_resize(fd, start + bytes);
    if (status == 0) status = tm_prim_map(address, bytes, fd, start, TM_PROTECT_WRITE);
    if (status == 0) status = tm_split(bytes, TM_PAGE_BYTES, threads, populate, &part);
    tm_prim_unmap(address, bytes);
    if (status < 0) (void)tm_prim_resize(fd, start);
    return status;
}

int tm_stock_fill(tm_stock *stock, uint64_t bytes, unsigned threads) {
    if (bytes > TM_BYTES_MAX) return TM_E_RANGE;
    int status = 0;
    pthread_mutex_lock(&stock->lock);
    for (uint64_t left = tm_round_up(bytes, TM_PAGE_BYTES); left > 0 && status == 0;) {
        while (stock->filling || stock->takers > 0) pthread_cond_wait(&stock->changed, &stock->lock);
        uint64_t step = tm_min(left, FILL_STEP);
        stock->filling = true;
        uint64_t start = stock->bytes;
        pthread_mutex_unlock(&stock->lock);
        status = grow(stock->fd, start, step, threads);
        pthread_mutex_lock(&stock->lock);
        stock->filling = false;
        if (status == 0) stock->bytes += step;
        left -= step;
        pthread_cond_broadcast(&stock->changed);
    }
    pthread_mutex_unlock(&stock->lock);
    return status;
}

int tm_stock_take(tm_stock *stock, uint64_t bytes, uint64_t *taken) {
    if (bytes > TM_BYTES_MAX) return TM_E_RANGE;
    pthread_mutex_lock(&stock->lock);
    stock->takers++;
    while (stock->filling) pthread_cond_wait(&stock->changed, &stock->lock);
    stock->takers--;
    uint64_t given = tm_min(tm_round_up(bytes, TM_PAGE_BYTES), stock->bytes);
    int status = tm_prim_resize(stock->fd, stock->bytes - given);
    if (status == 0) {
        stock->bytes -= given;
        *taken = given;
    }
    pthread_cond_broadcast(&stock->changed);
    pthread_mutex_unlock(&stock->lock);
    return status;
}

uint64_t tm_stock_bytes(tm_stock *stock) {
    pthread_mutex_lock(&stock->lock);
    uint64_t bytes = stock->bytes;
    pthread_mutex_unlock(&stock->lock);
    return bytes;
}

void tm_stock_close(tm_stock *stock) {
    if (stock == NULL) return;
    tm_prim_close(stock->fd);
    pthread_cond_destroy(&stock->changed);
    pthread_mutex_destroy(&stock->lock);
    free(stock);
}
