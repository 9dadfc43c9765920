/* Drives the page cache (autoaccum/devices/cpu/source/cache.c) by itself, against a model: tests/test_page_cache.py.
 *
 *     driver random OPERATIONS SEED | threads OPERATIONS SEED | fork OPERATIONS SEED | limit MIB SEED | moving MIB SEED
 *
 * Each block is filled with words of its own, which must still be there when it is freed; and after each operation the
 * cache's counts must be what the model has. Compiled with -DCACHE_MREMAP=stubborn, mremap fails now and then.
 */
#define _GNU_SOURCE
#include "cache.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(holds)                                                                       \
    do {                                                                                   \
        if (!(holds)) {                                                                    \
            fprintf(stderr, "line %d: %s, at operation %zu\n", __LINE__, #holds, now);     \
            abort();                                                                       \
        }                                                                                  \
    } while (0)

#ifdef CACHE_MOST_PIECES /* all that is free goes back now and then, so that less than the peak may be committed */
enum { RENEWS = true };
#else
enum { RENEWS = false };
#endif
enum { PAGE = 4096, MOST_BLOCKS = 192, THREADS = 4 };
static __thread size_t now;

struct owned {
    char *start;
    size_t bytes;
    uint64_t mark;
};

static uint64_t drawn(uint64_t *state) { /* xorshift64 */
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

/* Mostly sizes that come again, as in training; else any. */
static size_t size_of(uint64_t *state) {
    uint64_t kind = drawn(state) % 8;
    if (kind < 5) return CACHE_THRESHOLD << (drawn(state) % 5);
    if (kind < 7) return CACHE_THRESHOLD + drawn(state) % (1 << 20);
    return CACHE_THRESHOLD + drawn(state) % (4 << 20);
}

static size_t in_pages(size_t bytes) { return (bytes + PAGE - 1) / PAGE * PAGE; }

static void mark(struct owned *block) {
    for (size_t at = 0; at + 8 <= block->bytes; at += 4 * PAGE) memcpy(block->start + at, &block->mark, 8);
    memcpy(block->start + block->bytes - 8, &block->mark, 8);
}

static bool is_marked(const struct owned *block) {
    for (size_t at = 0; at + 8 <= block->bytes - 8; at += 4 * PAGE)
        if (memcmp(block->start + at, &block->mark, 8)) return false;
    return !memcmp(block->start + block->bytes - 8, &block->mark, 8);
}

static struct cache_counts counts(void) {
    struct cache_counts found;
    autoaccum_cache_counts(&found);
    return found;
}

static size_t data_bytes(void) {
    FILE *file = fopen("/proc/self/statm", "r");
    size_t data = 0;
    CHECK(fscanf(file, "%*u %*u %*u %*u %*u %zu", &data) == 1);
    fclose(file);
    return data * PAGE;
}

#ifndef CACHE_MREMAP
enum { IS_STUBBORN = false };
#else
enum { IS_STUBBORN = true };

void *stubborn(void *from, size_t old, size_t bytes, int flags, void *to) {
    static uint64_t state = 88172645463325252u;
    uint64_t kind = drawn(&state) % 64;
    if ((bytes > PAGE && kind < 8) || kind == 63) {
        errno = kind == 63 ? ENOMEM : EFAULT;
        return MAP_FAILED;
    }
    void *found = mremap(from, old, bytes, flags, to);
    if (kind == 62) /* another thread maps a page where these were, before the cache reserves that again */
        mmap(from, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    return found;
}
#endif

static void allocate(struct owned *block, uint64_t *state) {
    *block = (struct owned){.bytes = size_of(state), .mark = drawn(state)};
    block->start = cache_allocate(block->bytes);
    CHECK(block->start && (uintptr_t)block->start % PAGE == 0);
    CHECK(cache_bytes(block->start) == in_pages(block->bytes));
    mark(block);
}

static void release(struct owned *block) {
    CHECK(is_marked(block) && cache_free(block->start));
    block->start = NULL;
}

static void run(size_t operations, uint64_t seed, bool trims) {
    static struct owned blocks[MOST_BLOCKS];
    uint64_t state = seed * 2654435769u + 1;
    size_t live = 0, peak = 0;
    for (size_t i = 0; i < MOST_BLOCKS; i++) live += blocks[i].start ? in_pages(blocks[i].bytes) : 0;
    peak = counts().peak;
    for (now = 0; now < operations; now++) {
        struct owned *block = &blocks[drawn(&state) % MOST_BLOCKS];
        if (block->start) {
            live -= in_pages(block->bytes);
            release(block);
            CHECK(!cache_free(block->start) && cache_bytes(block->start) == 0);
        } else {
            allocate(block, &state);
            live += in_pages(block->bytes);
            if (live > peak) peak = live;
        }
        struct cache_counts found = counts();
        CHECK(found.live == live && found.peak == peak);
        CHECK(found.live + found.kept == peak || (RENEWS && found.live + found.kept < peak));
        CHECK(found.committed - found.returned == found.live + found.kept);
        if (trims && now % 100000 == 99999) {
            autoaccum_cache_trim();
            CHECK(counts().live == live && counts().kept == 0 && counts().committed - counts().returned == live);
            peak = live;
        }
    }
    struct cache_counts found = counts();
    printf("{\"peak\": %lu, \"committed\": %lu, \"moved\": %lu, \"pieces\": %lu}\n", found.peak, found.committed,
           found.moved, found.pieces);
}

/* -- threads: each takes blocks and leaves them in a place where any other finds and frees them */

static struct owned *volatile places[64];

static void *work(void *argument) {
    size_t *order = argument;
    uint64_t state = order[1] * 40503u + 7;
    for (now = 0; now < order[0]; now++) {
        struct owned *made = malloc(sizeof *made);
        allocate(made, &state);
        struct owned *other = __atomic_exchange_n(&places[drawn(&state) % 64], made, __ATOMIC_ACQ_REL);
        if (!other) continue;
        release(other);
        free(other);
    }
    return NULL;
}

static void run_threads(size_t operations, uint64_t seed) {
    pthread_t threads[THREADS];
    size_t orders[THREADS][2];
    for (size_t i = 0; i < THREADS; i++) {
        orders[i][0] = operations / THREADS, orders[i][1] = seed + i;
        CHECK(!pthread_create(&threads[i], NULL, work, orders[i]));
    }
    for (size_t i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    for (size_t i = 0; i < 64; i++)
        if (places[i]) release(places[i]), free(places[i]);
    CHECK(counts().live == 0 && counts().kept == counts().peak);
    printf("{\"peak\": %lu}\n", counts().peak);
}

/* -- fork: the child goes on with what it inherited, while the parent's threads are at work */

static void run_fork(size_t operations, uint64_t seed) {
    pthread_atfork(cache_lock, cache_unlock, cache_unlock);
    pthread_t thread;
    size_t order[2] = {operations, seed};
    struct owned kept;
    uint64_t state = seed + 1;
    allocate(&kept, &state);
    CHECK(!pthread_create(&thread, NULL, work, order));
    for (int i = 0; i < 20; i++) {
        pid_t child = fork();
        if (!child) {
            alarm(20); /* a lock that nobody holds open */
            size_t again[2] = {operations / 20, seed + 2};
            work(again);
            mark(&(struct owned){kept.start, kept.bytes, 1});
            _exit(cache_free(kept.start) ? 0 : 1);
        }
        int status = 1;
        CHECK(waitpid(child, &status, 0) == child && status == 0);
        CHECK(is_marked(&kept));
    }
    pthread_join(thread, NULL);
    printf("{\"peak\": %lu}\n", counts().peak);
}

/* -- a limit: what doesn't fit is refused, nothing is lost, and all that is free is available in one piece */

static void run_limit(size_t mib, uint64_t seed) {
    static struct owned blocks[4096];
    uint64_t state = seed + 3;
    struct owned first;
    allocate(&first, &state);
    struct rlimit limit = {0, 0};
    limit.rlim_cur = limit.rlim_max = data_bytes() + (mib << 20);
    CHECK(!setrlimit(RLIMIT_DATA, &limit));
    for (int round = 0; round < 50; round++, now++) {
        size_t count = 0;
        while (count < 4096) {
            size_t bytes = size_of(&state);
            struct cache_counts before = counts();
            char *start = cache_allocate(bytes);
            if (!start) {
                CHECK(before.kept < in_pages(bytes) && counts().live == before.live);
                CHECK(IS_STUBBORN || counts().kept == before.kept);
                break;
            }
            blocks[count] = (struct owned){start, bytes, drawn(&state)};
            mark(&blocks[count++]);
        }
        CHECK(count > 3 && count < 4096);
        for (size_t i = round % 2; i < count; i += 2) release(&blocks[i]);
        size_t free_bytes = counts().kept;
        struct owned whole = {cache_allocate(free_bytes), free_bytes, drawn(&state)};
        CHECK(whole.start && counts().kept == 0);
        mark(&whole);
        release(&whole);
        for (size_t i = 0; i < count; i++)
            if (blocks[i].start) release(&blocks[i]);
        CHECK(counts().live == in_pages(first.bytes));
    }
    size_t stack_bytes = 1 << 20; /* statm's figure has it, and the limit is on the rest */
    CHECK(counts().live + counts().kept <= (mib << 20) + in_pages(first.bytes) + stack_bytes);
    CHECK(counts().peak > (mib << 20) * 9 / 10);
    release(&first);
    printf("{\"peak\": %lu}\n", counts().peak);
}

/* -- pages on their way: /proc counts them twice for a moment (mm/mremap.c, move_vma); a limit must not refuse others
 * for that. The kernel checks limits under the lock that the move holds. */

static volatile bool is_moving = true;
static size_t mapped_beside, most_seen;

static void *map_beside(void *argument) {
    for (now = 0; is_moving; now++, mapped_beside++) {
        char *found = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(found != MAP_FAILED);
        munmap(found, 1 << 20);
    }
    return argument;
}

static void *look(void *argument) {
    while (is_moving) {
        size_t seen = data_bytes();
        if (seen > most_seen) most_seen = seen;
    }
    return argument;
}

static void move_once(size_t part) { /* two free runs on either side of a live one, and one block that needs both */
    char *before = cache_allocate(part), *between = cache_allocate(part), *behind = cache_allocate(part);
    CHECK(before && between && behind);
    for (size_t at = 0; at < part; at += PAGE) before[at] = behind[at] = 1;
    cache_free(before), cache_free(behind);
    char *whole = cache_allocate(2 * part);
    CHECK(whole);
    cache_free(whole), cache_free(between);
    autoaccum_cache_trim();
}

static void run_moving(size_t mib, uint64_t seed) {
    size_t part = (mib << 20) / 2, rounds = 0;
    struct rlimit limit = {0, 0};
    pthread_t threads[2];
    CHECK(!pthread_create(&threads[0], NULL, map_beside, NULL) && !pthread_create(&threads[1], NULL, look, NULL));
    move_once(part);
    limit.rlim_cur = limit.rlim_max = data_bytes() + 3 * part + (4 << 20);
    CHECK(!setrlimit(RLIMIT_DATA, &limit));
    for (; rounds < 40 + seed || mapped_beside < 1000; rounds++) move_once(part);
    is_moving = false;
    for (size_t i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    CHECK(counts().moved >= rounds * part);
    printf("{\"mapped\": %zu, \"moved\": %lu, \"over\": %zd}\n", mapped_beside, counts().moved,
           (ssize_t)most_seen - (ssize_t)limit.rlim_cur);
}

int main(int count, char **words) {
    if (count != 4) return 2;
    size_t much = strtoul(words[2], NULL, 10), seed = strtoul(words[3], NULL, 10);
    if (!strcmp(words[1], "random")) run(much, seed, true);
    else if (!strcmp(words[1], "threads")) run_threads(much, seed);
    else if (!strcmp(words[1], "fork")) run_fork(much, seed);
    else if (!strcmp(words[1], "limit")) run_limit(much, seed);
    else if (!strcmp(words[1], "moving")) run_moving(much, seed);
    else return 2;
    return 0;
}
