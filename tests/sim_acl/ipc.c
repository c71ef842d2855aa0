/* Memory that one process exports and another imports. A key names the process, its file and how much of it; the importer
 * opens the file through /proc, as the same user. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "sim.h"

struct import {
    char key[64];
    void *base;
    struct import *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct import *imports;

API aclError aclrtIpcMemGetExportKey(void *address, size_t bytes, char *key, size_t room, uint64_t flags) {
    (void)flags;
    uint64_t call = sim_enter(__func__, bytes);
    int fd;
    int32_t device;
    uint64_t all;
    if (!sim_range_file(address, &fd, &all, &device)) return sim_end(call, ACL_PARAM_INVALID);
    int length = snprintf(key, room, "sim %d %d %d %" PRIu64, getpid(), fd, device, all);
    return sim_end(call, length > 0 && (size_t)length < room ? ACL_SUCCESS : ACL_PARAM_INVALID);
}

static aclError import(struct import *made, const char *key) {
    int process, fd;
    int32_t device;
    uint64_t bytes;
    if (sscanf(key, "sim %d %d %d %" SCNu64, &process, &fd, &device, &bytes) != 4) return ACL_PARAM_INVALID;
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", process, fd);
    int opened = open(path, O_RDWR | O_CLOEXEC);
    if (opened < 0) return ACL_INVALID_HANDLE;
    snprintf(made->key, sizeof made->key, "%s", key);
    made->base = sim_memory_open(opened, bytes, device, false);
    if (made->base) return ACL_SUCCESS;
    close(opened);
    return ACL_NO_RESOURCE;
}

API aclError aclrtIpcMemImportByKey(void **address, const char *key, uint64_t flags) {
    (void)flags;
    uint64_t call = sim_enter(__func__, 0);
    struct import *made = calloc(1, sizeof *made);
    if (!made) return sim_end(call, ACL_NO_RESOURCE);
    aclError status = import(made, key);
    if (status) {
        free(made);
        return sim_end(call, status);
    }
    *address = made->base;
    pthread_mutex_lock(&lock);
    made->next = imports;
    imports = made;
    pthread_mutex_unlock(&lock);
    return sim_end(call, ACL_SUCCESS);
}

/* By the importer it ends the import, by the exporter it does nothing: the memory is its own. */
API aclError aclrtIpcMemClose(const char *key) {
    uint64_t call = sim_enter(__func__, 0);
    struct import *found = NULL;
    pthread_mutex_lock(&lock);
    for (struct import **at = &imports; *at && !found; at = found ? at : &(*at)->next) {
        if (strcmp((*at)->key, key)) continue;
        found = *at;
        *at = found->next;
    }
    pthread_mutex_unlock(&lock);
    if (found) sim_memory_close(found->base);
    free(found);
    return sim_end(call, ACL_SUCCESS);
}

API aclError aclrtIpcMemSetImportPid(const char *key, int32_t *processes, size_t count) {
    (void)key, (void)processes, (void)count;
    return sim_accept(__func__);
}
