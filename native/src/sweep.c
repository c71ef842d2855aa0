/* Sweep: pages of many mappings take turns at being unmapped, and each turn tells which of the last came back.
 *
 * Every page of a mapping has its turn once a round. A mapping is dropped under the lock that a turn holds, so that no
 * turn touches addresses that were given back.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "internal.h"

#define FAULT_AROUND 16 /* OS pages of 4 KiB that one fault maps, unless the host was set up otherwise */

static double least(double a, double b) { return a < b ? a : b; }

struct mapping {
    struct mapping *next;
    uint64_t key, address;
    uint32_t pages, cursor;
    const uint32_t *order; /* the caller's, like mask */
    uint8_t *mask;
    double credit;     /* pages that are due, less than one */
    uint32_t *was;     /* pages of the window that is open, ascending; none of them was mapped when it began */
    uint32_t was_count;
    uint64_t begin_ns;
};

struct tm_sweep {
    tm_pagemap *pagemap;
    pthread_mutex_t lock; /* guards the mappings; held for a turn */
    struct mapping *first;
    uint64_t pages;       /* of all mappings */
    pthread_mutex_t gate; /* guards `woken` */
    pthread_cond_t wake;
    bool woken;
};

int tm_sweep_open(tm_pagemap *pagemap, tm_sweep **sweep) {
    tm_sweep *made = calloc(1, sizeof *made);
    if (made == NULL) return -ENOMEM;
    made->pagemap = pagemap;
    pthread_mutex_init(&made->lock, NULL);
    pthread_mutex_init(&made->gate, NULL);
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&made->wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    *sweep = made;
    return 0;
}

static void free_mapping(struct mapping *mapping) {
    free(mapping->was);
    free(mapping);
}

void tm_sweep_close(tm_sweep *sweep) {
    if (sweep == NULL) return;
    for (struct mapping *mapping = sweep->first, *next; mapping != NULL; mapping = next) {
        next = mapping->next;
        free_mapping(mapping);
    }
    pthread_cond_destroy(&sweep->wake);
    pthread_mutex_destroy(&sweep->gate);
    pthread_mutex_destroy(&sweep->lock);
    free(sweep);
}

int tm_sweep_add(tm_sweep *sweep, uint64_t key, uint64_t address, uint32_t pages, const uint32_t *order, uint8_t *mask) {
    if (!tm_is_whole_pages(address)) return TM_E_ALIGN;
    if (pages == 0) return -EINVAL;
    for (uint32_t i = 0; i < pages; i++)
        if (order[i] >= pages) return TM_E_RANGE;
    struct mapping *made = calloc(1, sizeof *made);
    if (made == NULL) return -ENOMEM;
    made->was = malloc(pages * sizeof *made->was);
    if (made->was == NULL) {
        free(made);
        return -ENOMEM;
    }
    made->key = key;
    made->address = address;
    made->pages = pages;
    made->order = order;
    made->mask = mask;
    pthread_mutex_lock(&sweep->lock);
    struct mapping **at = &sweep->first;
    while (*at != NULL) at = &(*at)->next; /* windows are told in the order of adding */
    *at = made;
    sweep->pages += pages;
    pthread_mutex_unlock(&sweep->lock);
    return 0;
}

void tm_sweep_drop(tm_sweep *sweep, uint64_t key) {
    pthread_mutex_lock(&sweep->lock);
    struct mapping **at = &sweep->first;
    while (*at != NULL && (*at)->key != key) at = &(*at)->next;
    struct mapping *dropped = *at;
    if (dropped != NULL) {
        *at = dropped->next;
        sweep->pages -= dropped->pages;
    }
    pthread_mutex_unlock(&sweep->lock);
    if (dropped != NULL) free_mapping(dropped);
}

/* --- one turn ----------------------------------------------------------------------------------------------------- */

struct scratch { /* for one mapping's turn; each has room for all of its pages */
    uint64_t *bits;
    uint32_t *due;
    uint16_t *was_state, *due_state;
    uint8_t *done;
};

static void *scratch_alloc(uint32_t pages, struct scratch *scratch) {
    uint64_t words = (uint64_t)pages / 64 + 1;
    char *memory = calloc(1, words * 8 + (uint64_t)pages * (4 + 2 + 2 + 1));
    if (memory == NULL) return NULL;
    scratch->bits = (uint64_t *)(void *)memory;
    scratch->due = (uint32_t *)(void *)(memory + words * 8);
    scratch->was_state = (uint16_t *)(void *)(scratch->due + pages);
    scratch->due_state = scratch->was_state + pages;
    scratch->done = (uint8_t *)(scratch->due_state + pages);
    return memory;
}

/* The next `share` of the pages, ascending, without those that cannot be sampled. */
static uint32_t choose(struct mapping *mapping, double share, struct scratch *scratch) {
    mapping->credit += mapping->pages * share;
    uint32_t wanted = (uint32_t)least(mapping->credit, (double)mapping->pages);
    mapping->credit = least(mapping->credit - wanted, 1.0);
    for (uint32_t i = 0; i < wanted; i++) {
        uint32_t page = mapping->order[mapping->cursor];
        mapping->cursor = mapping->cursor + 1 == mapping->pages ? 0 : mapping->cursor + 1;
        mapping->mask[page] &= (uint8_t)~TM_SWEEP_HELD; /* it may have been unlocked */
        if (mapping->mask[page] == 0) scratch->bits[page / 64] |= UINT64_C(1) << (page % 64);
    }
    uint32_t count = 0;
    for (uint32_t word = 0; word <= mapping->pages / 64; word++)
        for (uint64_t left = scratch->bits[word]; left != 0; left &= left - 1)
            scratch->due[count++] = word * 64 + (uint32_t)__builtin_ctzll(left);
    return count;
}

static void tell_window(struct mapping *mapping, const uint16_t *state, uint64_t end_ns, tm_sweep_results *results) {
    tm_sweep_window *window = &results->windows[results->window_count];
    *window = (tm_sweep_window){mapping->key, mapping->begin_ns, end_ns, results->page_count, 0};
    for (uint32_t i = 0; i < mapping->was_count; i++) {
        uint32_t page = mapping->was[i];
        unsigned present = state[i] & TM_PAGE_PRESENT;
        if (state[i] & TM_PAGE_PRIVATE) mapping->mask[page] |= TM_SWEEP_FOREIGN;
        if (mapping->mask[page] != 0) continue;
        results->pages[results->page_count] = page;
        results->touched[results->page_count++] = present > 0;
        window->count++;
        results->faults += state[i] & TM_PAGE_HUGE ? 1 : (present + FAULT_AROUND - 1) / FAULT_AROUND;
    }
    if (window->count > 0 && mapping->begin_ns < end_ns) {
        results->window_count++;
    } else {
        results->page_count = window->first;
    }
}

static int turn_mapping(tm_sweep *sweep, struct mapping *mapping, double share, bool timed, tm_sweep_results *results) {
    struct scratch scratch;
    void *memory = scratch_alloc(mapping->pages, &scratch);
    if (memory == NULL) return -ENOMEM;
    uint32_t due = choose(mapping, share, &scratch);
    uint64_t fault_ns = 0, end_ns = tm_prim_now_ns(), begin_cpu = tm_prim_thread_ns();
    int status = tm_pagemap_turn(sweep->pagemap, mapping->address, mapping->was, mapping->was_count, scratch.was_state,
                                 scratch.due, due, scratch.due_state, scratch.done, timed ? &fault_ns : NULL);
    results->turn_ns += tm_prim_thread_ns() - begin_cpu;
    if (status == 0) {
        tell_window(mapping, scratch.was_state, end_ns, results);
        mapping->was_count = 0;
        for (uint32_t i = 0; i < due; i++) {
            uint32_t page = scratch.due[i];
            bool mapped = scratch.due_state[i] & TM_PAGE_PRESENT;
            if (scratch.due_state[i] & TM_PAGE_PRIVATE) mapping->mask[page] |= TM_SWEEP_FOREIGN;
            else if (mapped && !scratch.done[i]) mapping->mask[page] |= TM_SWEEP_HELD;
            else mapping->was[mapping->was_count++] = page;
        }
        /* From here on a touch shows: one between the look and the unmapping is in no window. */
        mapping->begin_ns = tm_prim_now_ns();
        results->due += mapping->was_count;
        if (fault_ns > 0) results->fault_ns = fault_ns;
    }
    free(memory);
    return status;
}

/* Room for what a turn can tell, which is of pages that had theirs at the last one. */
static bool has_room(const tm_sweep *sweep, const tm_sweep_results *results) {
    uint64_t windows = 0, pages = 0;
    for (const struct mapping *mapping = sweep->first; mapping != NULL; mapping = mapping->next) {
        windows++;
        pages += mapping->was_count;
    }
    return results->window_count + windows <= results->window_capacity &&
           results->page_count + pages <= results->page_capacity;
}

static int turn(tm_sweep *sweep, uint64_t quota, bool timed, tm_sweep_results *results) {
    pthread_mutex_lock(&sweep->lock);
    int status = has_room(sweep, results) ? 0 : -ENOBUFS;
    double share = sweep->pages > 0 ? least((double)quota / (double)sweep->pages, 1.0) : 0.0;
    for (struct mapping *mapping = sweep->first; mapping != NULL && status == 0; mapping = mapping->next)
        status = turn_mapping(sweep, mapping, share, timed, results);
    pthread_mutex_unlock(&sweep->lock);
    if (status == 0) results->turns++;
    return status;
}

/* --- many turns ----------------------------------------------------------------------------------------------------- */

void tm_sweep_wake(tm_sweep *sweep) {
    pthread_mutex_lock(&sweep->gate);
    sweep->woken = true;
    pthread_cond_signal(&sweep->wake);
    pthread_mutex_unlock(&sweep->gate);
}

/* Whether nobody woke the sweep until then. */
static bool sleep_until(tm_sweep *sweep, uint64_t until_ns) {
    struct timespec until = {(time_t)(until_ns / 1000000000u), (long)(until_ns % 1000000000u)};
    pthread_mutex_lock(&sweep->gate);
    while (!sweep->woken && pthread_cond_timedwait(&sweep->wake, &sweep->gate, &until) == 0) continue;
    bool undisturbed = !sweep->woken;
    pthread_mutex_unlock(&sweep->gate);
    return undisturbed;
}

int tm_sweep_run(tm_sweep *sweep, uint64_t quota, uint32_t turns, uint64_t epoch_ns, int timed,
                 tm_sweep_results *results) {
    results->window_count = results->page_count = results->turns = 0;
    results->due = results->faults = results->turn_ns = results->fault_ns = 0;
    uint64_t next_ns = tm_prim_now_ns();
    int status = 0;
    for (uint32_t done = 0; done < turns && status == 0; done++) {
        if (done > 0 && !sleep_until(sweep, next_ns)) break;
        status = turn(sweep, quota, timed && done == 0, results);
        next_ns = tm_max(next_ns + epoch_ns, tm_prim_now_ns());
    }
    pthread_mutex_lock(&sweep->gate);
    sweep->woken = false;
    pthread_mutex_unlock(&sweep->gate);
    return status == -ENOBUFS && results->turns > 0 ? 0 : status;
}
