/* A cache of pages for the CPU's tensors.
 *
 * The C library maps a large block anew each time, so that the kernel zeroes its pages again and again, or keeps it in
 * a heap that fragments by chance. Here pages are taken from the kernel once. The rules:
 *
 *   1. A block takes whole pages: its size, rounded up.
 *   2. The pages of a freed block stay, and merge with free neighbours. The next block takes the smallest free run that
 *      is large enough, the lowest of equal ones.
 *   3. Where no run is large enough, free pages are put side by side: mremap moves them to other addresses without
 *      touching what is in them (10 to 200 ns for a page; to zero a fresh one takes over 1,000). Fresh pages are taken
 *      for what all free ones together lack, and for nothing else.
 *
 * So the committed pages are at any time the most that were alive at once, whatever the order of events, and no memory
 * is lost to fragmentation: simulation/malloc.py replays that. Pages go back to the kernel at a trim, and where too
 * many moves have cut the address space into too many mappings.
 */
#define _GNU_SOURCE
#include "cache.h"
#include "blocks.h"

#include <errno.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif
#ifdef CACHE_MREMAP /* a test puts in one that fails */
void *CACHE_MREMAP(void *, size_t, size_t, int, void *);
#else
#define CACHE_MREMAP mremap
#endif
#ifndef CACHE_MOST_PIECES
#define CACHE_MOST_PIECES 8192 /* each move leaves two mappings more at most; a process may have 65,530 */
#endif

static const size_t LARGEST_ARENA = (size_t)1 << 40, SMALLEST_ARENA = (size_t)1 << 32;
enum { RESERVED = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uintptr_t arena; /* where the pages lie; 0 where there is none */
static size_t arena_bytes, page_bytes;
static bool tried;
static size_t live, kept, peak; /* pages, as in cache_counts */
static size_t committed, returned, moved, pieces, recent_pieces;

static void *address_of(size_t page) { return (void *)(arena + page * page_bytes); }

/* -- pages: commit, give back, move */

static bool commit(size_t page, size_t pages) {
    if (pages && mprotect(address_of(page), pages * page_bytes, PROT_READ | PROT_WRITE)) return false;
    committed += pages;
    return true;
}

/* Reserve addresses for pages. Where the kernel has 2 MiB of them to commit it may take one huge page, which costs fewer
 * look-ups of addresses later (1 to 5 % of a window's time) and no byte more. */
static void *reserve_at(void *start, size_t bytes, int flags) {
    void *found = mmap(start, bytes, PROT_NONE, RESERVED | flags, -1, 0);
    if (found != MAP_FAILED) (void)madvise(found, bytes, MADV_HUGEPAGE); /* a kernel without them refuses */
    return found;
}

/* Put a reservation over addresses and whatever pages lie there. */
static bool reserve_again(size_t page, size_t pages) {
    return reserve_at(address_of(page), pages * page_bytes, MAP_FIXED) != MAP_FAILED;
}

static void give_all_back(void) {
    size_t held = 0;
    recent_pieces = 0;
    while (cached.count > held && room()) {
        struct block *block = cached.blocks[cached.count - 1 - held];
        if (!reserve_again(block->page, block->pages)) { /* too many mappings: its pages stay */
            held++;
            continue;
        }
        take_out(block);
        kept -= block->pages;
        returned += block->pages;
        block->state = EMPTY;
        settle(block);
    }
}

/* Move free pages; the addresses that they leave are reserved again unless someone has mapped there in between. */
static bool move(size_t page, size_t pages, size_t to, bool *is_lost) {
    size_t bytes = pages * page_bytes;
    void *from = address_of(page);
    if (CACHE_MREMAP(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, address_of(to)) == MAP_FAILED) {
        if (errno != EFAULT || pages == 1) return false;
        /* Pages that were moved here in pieces: before Linux 6.17, mremap takes one mapping at a time. */
        return move(page, pages / 2, to, is_lost) && move(page + pages / 2, pages - pages / 2, to + pages / 2, is_lost);
    }
    pieces++;
    recent_pieces++;
    void *again = reserve_at(from, bytes, MAP_FIXED_NOREPLACE);
    if (again != from) {
        if (again != MAP_FAILED) munmap(again, bytes); /* a kernel that doesn't know the flag */
        *is_lost = true;
    }
    return true;
}

/* Take pages of a free run for addresses without pages; they count as in nobody's hands then. */
static bool pull(struct block *donor, size_t pages, size_t to) {
    take_out(donor);
    struct block *part = donor;
    if (donor->pages > pages) { /* its end; the rest keeps its place */
        part = cut(donor, donor->pages - pages);
        put_in(donor);
    }
    bool is_lost = false, done = move(part->page, pages, to, &is_lost);
    kept -= pages;
    if (done) {
        moved += pages;
    } else { /* what was in them is of no value: give them back, and take fresh ones */
        returned += pages;
        is_lost = !reserve_again(part->page, pages);
        done = reserve_again(to, pages) && commit(to, pages);
    }
    part->state = is_lost ? LOST : EMPTY;
    settle(part);
    return done;
}

/* -- runs of pages for a block */

static struct block *reused(size_t pages) {
    size_t at = place(&cached, pages, 0);
    if (at == cached.count) return NULL;
    struct block *block = cached.blocks[at];
    take_out(block);
    struct block *rest = cut(block, pages);
    if (rest) put_in(rest);
    kept -= pages;
    return block;
}

/* The largest free run that addresses behind it make large enough; NULL for none. */
static struct block *extendable(size_t pages) {
    for (size_t at = cached.count; at-- > 0;) {
        struct block *block = cached.blocks[at], *after = block->after;
        if (after && after->state == EMPTY && block->pages + after->pages >= pages) return block;
    }
    return NULL;
}

/* Fill addresses with free pages and, for what those lack, fresh ones; return how many were filled. */
static size_t fill(size_t page, size_t pages) {
    size_t filled = 0;
    while (filled < pages && cached.count && room()) {
        size_t missing = pages - filled, at = place(&cached, missing, 0);
        struct block *donor = cached.blocks[at < cached.count ? at : cached.count - 1];
        size_t part = donor->pages < missing ? donor->pages : missing;
        if (!pull(donor, part, page + filled)) return filled;
        filled += part;
    }
    return commit(page + filled, pages - filled) ? pages : filled;
}

/* Put free pages side by side, and take fresh ones for what they lack. */
static struct block *gathered(size_t pages) {
    if (recent_pieces > CACHE_MOST_PIECES) give_all_back();
    struct block *base = extendable(pages), *target;
    size_t had = base ? base->pages : 0, at = place(&empty, pages, 0);
    if (!base && at == empty.count) return NULL;
    target = base ? base->after : empty.blocks[at];
    take_out(target);
    if (base) {
        take_out(base);
        kept -= had;
    }
    struct block *rest = cut(target, pages - had);
    if (rest) put_in(rest);
    target->state = LIVE; /* nobody merges with it meanwhile */
    if (base) base->state = LIVE;
    size_t filled = fill(target->page, target->pages);
    if (filled == target->pages) {
        if (!base) return target;
        absorb(base, target);
        return base;
    }
    if (base) { /* a limit: keep what was put together */
        base->state = CACHED;
        kept += had;
        settle(base);
    }
    rest = filled ? cut(target, filled) : target;
    if (filled) {
        target->state = CACHED;
        kept += filled;
        settle(target);
    }
    rest->state = reserve_again(rest->page, rest->pages) ? EMPTY : LOST;
    settle(rest);
    return NULL;
}

/* Reserve addresses, once. Under a limit on them (RLIMIT_AS) nothing is: what is reserved would count. */
static bool reserve(void) {
    if (tried) return arena != 0;
    tried = true;
    page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    struct rlimit limit;
    if (getrlimit(RLIMIT_AS, &limit) || limit.rlim_cur != RLIM_INFINITY || !room()) return false;
    for (size_t bytes = LARGEST_ARENA; bytes >= SMALLEST_ARENA; bytes /= 2) {
        void *found = reserve_at(NULL, bytes, 0);
        if (found == MAP_FAILED) continue;
        arena_bytes = bytes;
        put_in(record(0, bytes / page_bytes, EMPTY));
        __atomic_store_n(&arena, (uintptr_t)found, __ATOMIC_RELEASE);
        return true;
    }
    return false;
}

/* -- what the rest of the process sees */

void *cache_allocate(size_t bytes) {
    pthread_mutex_lock(&lock);
    void *found = NULL;
    if (bytes <= LARGEST_ARENA && reserve() && room()) {
        size_t pages = (bytes + page_bytes - 1) / page_bytes;
        struct block *block = reused(pages);
        if (!block) block = gathered(pages);
        if (block) {
            block->state = LIVE;
            enter(block);
            live += pages;
            if (live > peak) peak = live;
            found = address_of(block->page);
        }
    }
    pthread_mutex_unlock(&lock);
    return found;
}

/* The live block that begins here; NULL for none. */
static struct block *found_at(const void *pointer) {
    uintptr_t offset = (uintptr_t)pointer - arena;
    return offset % page_bytes ? NULL : look_up(offset / page_bytes);
}

static bool owns(const void *pointer) {
    uintptr_t start = __atomic_load_n(&arena, __ATOMIC_ACQUIRE);
    return start && (uintptr_t)pointer - start < arena_bytes;
}

size_t cache_bytes(const void *pointer) {
    if (!owns(pointer)) return 0;
    pthread_mutex_lock(&lock);
    struct block *block = found_at(pointer);
    size_t found = block ? block->pages * page_bytes : 0;
    pthread_mutex_unlock(&lock);
    return found;
}

bool cache_free(void *pointer) {
    if (!owns(pointer)) return false;
    pthread_mutex_lock(&lock);
    struct block *block = found_at(pointer);
    if (block) {
        leave(block);
        live -= block->pages;
        if (room()) { /* else its pages are lost, and the program goes on */
            kept += block->pages;
            block->state = CACHED;
            settle(block);
        }
    }
    pthread_mutex_unlock(&lock);
    return block != NULL;
}

void cache_lock(void) { pthread_mutex_lock(&lock); }

void cache_unlock(void) { pthread_mutex_unlock(&lock); }

PUBLIC bool autoaccum_cache_reserve(void) {
    pthread_mutex_lock(&lock);
    bool done = reserve();
    pthread_mutex_unlock(&lock);
    return done;
}

PUBLIC void autoaccum_cache_trim(void) {
    pthread_mutex_lock(&lock);
    give_all_back();
    peak = live;
    pthread_mutex_unlock(&lock);
}

PUBLIC void autoaccum_cache_counts(struct cache_counts *counts) {
    pthread_mutex_lock(&lock);
    *counts = (struct cache_counts){live * page_bytes,      kept * page_bytes,     peak * page_bytes,
                                    committed * page_bytes, returned * page_bytes, moved * page_bytes, pieces};
    pthread_mutex_unlock(&lock);
}
