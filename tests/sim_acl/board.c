/* Board: how much of each device is taken. Processes that name one file in SIM_ACL_BOARD share their devices' capacity.
 *
 * The file is a table with a row for each process. Byte 0 is locked while the table is read or written, byte 1 + r as long as
 * the process of row r lives: the kernel drops that lock with the process, and its row counts no more. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "sim.h"

enum { ROWS = 64 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint64_t (*rows)[SIM_DEVICES_MAX];
static int file = -1;
static int mine;

static void give_up(const char *what) {
    fprintf(stderr, "simulated ACL: %s: %s\n", what, strerror(errno));
    abort();
}

static bool lock_byte(int command, off_t at, short type) {
    struct flock range = {.l_type = type, .l_whence = SEEK_SET, .l_start = at, .l_len = 1};
    while (fcntl(file, command, &range))
        if (errno != EINTR) return false;
    return command != F_GETLK || range.l_type != F_UNLCK;
}

static void attach(void) {
    const char *path = getenv("SIM_ACL_BOARD");
    file = path ? open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600) : memfd_create("sim_acl_board", MFD_CLOEXEC);
    if (file < 0 || ftruncate(file, ROWS * sizeof *rows)) give_up("the board's file");
    rows = mmap(NULL, ROWS * sizeof *rows, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (rows == MAP_FAILED) give_up("the board's file");
    while (mine < ROWS && !lock_byte(F_SETLK, 1 + mine, F_WRLCK)) mine++;
    if (mine == ROWS) give_up("more processes than the board has rows");
    memset(rows[mine], 0, sizeof *rows);
}

static void enter(void) {
    pthread_mutex_lock(&lock);
    if (file < 0) attach();
    if (!lock_byte(F_SETLKW, 0, F_WRLCK)) give_up("the board's lock");
}

static void leave(void) {
    lock_byte(F_SETLK, 0, F_UNLCK);
    pthread_mutex_unlock(&lock);
}

static uint64_t taken(int32_t device) {
    uint64_t sum = 0;
    for (int row = 0; row < ROWS; row++)
        if (row == mine || (rows[row][device] && lock_byte(F_GETLK, 1 + row, F_WRLCK))) sum += rows[row][device];
    return sum;
}

bool sim_board_take(int32_t device, uint64_t bytes) {
    enter();
    uint64_t before = taken(device);
    bool fits = before <= sim_capacity() && bytes <= sim_capacity() - before;
    if (fits) rows[mine][device] += bytes;
    leave();
    return fits;
}

void sim_board_give(int32_t device, uint64_t bytes) {
    enter();
    rows[mine][device] -= bytes;
    leave();
}

uint64_t sim_board_free(int32_t device) {
    enter();
    uint64_t before = taken(device);
    leave();
    return before < sim_capacity() ? sim_capacity() - before : 0;
}

uint64_t sim_acl_device_bytes(int32_t device) {
    if (device < 0 || device >= SIM_DEVICES_MAX) return 0;
    enter();
    uint64_t bytes = rows[mine][device];
    leave();
    return bytes;
}
