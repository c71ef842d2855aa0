/* The reading side of a ring's protocol, over any memory of its shape: so that tests can play the kernel. */
#ifndef TIERMEM_RING_H
#define TIERMEM_RING_H
#include "internal.h"

/* Moves whole records out, oldest first, and adds to *lost what PERF_RECORD_LOST among them tell. TM_E_SHORT if the
 * next one exceeds `capacity`; TM_E_RANGE if it is none: then all that the buffer held is dropped, so that the next
 * call is sound again. */
int tm_buffer_read_records(tm_buffer *buffer, void *records, uint64_t capacity, uint64_t *got, uint64_t *lost);
/* The same for a stream of bytes. */
int tm_buffer_read_bytes(tm_buffer *buffer, void *bytes, uint64_t capacity, uint64_t *got);
#endif
