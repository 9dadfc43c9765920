/* What the page cache (cache.c) offers to the functions that stand in for the C library's (malloc.c), and to Python. */
#ifndef AUTOACCUM_CACHE_H
#define AUTOACCUM_CACHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PUBLIC __attribute__((visibility("default")))

enum { CACHE_THRESHOLD = 128 * 1024 }; /* bytes: smaller blocks stay in the C library's heap */

struct cache_counts {         /* in bytes, but for the last */
    uint64_t live, kept;      /* handed out; free and committed: together they are what the cache has committed */
    uint64_t peak;            /* the most that was live since the start or the last trim */
    uint64_t committed;       /* pages from the kernel since the start */
    uint64_t returned;        /* pages given back to it since the start */
    uint64_t moved, pieces;   /* free pages that were put side by side, and in how many calls */
};

void *cache_allocate(size_t bytes);
bool cache_free(void *pointer);           /* false: the cache has no such block */
size_t cache_bytes(const void *pointer);  /* of a live block; 0 for what is none */
void cache_lock(void);                    /* around a fork */
void cache_unlock(void);

PUBLIC bool autoaccum_cache_reserve(void); /* its addresses; false: a limit on them forbids it */
PUBLIC void autoaccum_cache_trim(void);
PUBLIC void autoaccum_cache_counts(struct cache_counts *counts);

#endif
