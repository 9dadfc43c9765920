/* The page cache's blocks: cut and joined, and found by size or by address. Nothing here touches the pages themselves. */
#define _GNU_SOURCE
#include "blocks.h"

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

struct index cached, empty;
static struct block *unused;
static size_t unused_count;
static struct block **table; /* live blocks by their first page */
static size_t slots, live_blocks;

/* -- records, the table and the indices: their memory comes from the kernel, never from malloc */

static void *from_kernel(size_t bytes) {
    void *found = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return found == MAP_FAILED ? NULL : found;
}

static void forget(struct block *block) {
    block->chain = unused;
    unused = block;
    unused_count++;
}

struct block *record(size_t page, size_t pages, enum state state) { /* room was made before */
    struct block *block = unused;
    unused = block->chain;
    unused_count--;
    *block = (struct block){.page = page, .pages = pages, .state = state};
    return block;
}

static bool room_in(struct index *index, size_t more) {
    if (index->count + more <= index->capacity) return true;
    size_t capacity = index->capacity ? 2 * index->capacity : 1024;
    struct block **blocks = from_kernel(capacity * sizeof *blocks);
    if (!blocks) return false;
    if (index->count) memcpy(blocks, index->blocks, index->count * sizeof *blocks);
    if (index->capacity) munmap(index->blocks, index->capacity * sizeof *blocks);
    index->blocks = blocks;
    index->capacity = capacity;
    return true;
}

static size_t slot_of(size_t page) { return (size_t)(page * UINT64_C(0x9E3779B97F4A7C15) >> 20) & (slots - 1); }

static bool room_in_table(void) {
    if (live_blocks < slots) return true;
    size_t before = slots;
    struct block **old = table, **made = from_kernel((before ? 2 * before : 4096) * sizeof *made);
    if (!made) return before > 0; /* fuller, and slower */
    slots = before ? 2 * before : 4096;
    table = made;
    for (size_t i = 0; i < before; i++)
        for (struct block *block = old[i], *next; block; block = next) {
            next = block->chain;
            block->chain = table[slot_of(block->page)];
            table[slot_of(block->page)] = block;
        }
    if (before) munmap(old, before * sizeof *old);
    return true;
}

/* Make room for one change of the list of blocks, so that nothing can fail in its middle. */
bool room(void) {
    enum { AT_ONCE = 8, BYTES = 64 * 1024 };
    if (unused_count < AT_ONCE) {
        struct block *more = from_kernel(BYTES);
        if (!more) return false;
        for (size_t i = 0; i < BYTES / sizeof *more; i++) forget(&more[i]);
    }
    return room_in(&cached, AT_ONCE) && room_in(&empty, AT_ONCE) && room_in_table();
}

/* The first place whose block has more pages, or as many and no lower address. */
size_t place(const struct index *index, size_t pages, size_t page) {
    size_t low = 0, high = index->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        const struct block *block = index->blocks[middle];
        if (block->pages < pages || (block->pages == pages && block->page < page)) low = middle + 1;
        else high = middle;
    }
    return low;
}

static struct index *index_of(enum state state) { return state == CACHED ? &cached : &empty; }

void put_in(struct block *block) {
    struct index *index = index_of(block->state);
    size_t at = place(index, block->pages, block->page);
    memmove(index->blocks + at + 1, index->blocks + at, (index->count - at) * sizeof *index->blocks);
    index->blocks[at] = block;
    index->count++;
}

void take_out(struct block *block) {
    struct index *index = index_of(block->state);
    size_t at = place(index, block->pages, block->page);
    index->count--;
    memmove(index->blocks + at, index->blocks + at + 1, (index->count - at) * sizeof *index->blocks);
}

/* -- cut and join. A block at hand is in no index. */

/* Cut a block after `pages`, and return the rest: NULL for none. */
struct block *cut(struct block *block, size_t pages) {
    if (block->pages == pages) return NULL;
    struct block *rest = record(block->page + pages, block->pages - pages, block->state);
    rest->before = block;
    rest->after = block->after;
    if (rest->after) rest->after->before = rest;
    block->after = rest;
    block->pages = pages;
    return rest;
}

void absorb(struct block *block, struct block *after) {
    block->pages += after->pages;
    block->after = after->after;
    if (block->after) block->after->before = block;
    forget(after);
}

/* Put a free block into its index, with its free neighbours of the same state. */
void settle(struct block *block) {
    if (block->state == LOST) return;
    if (block->after && block->after->state == block->state) {
        take_out(block->after);
        absorb(block, block->after);
    }
    if (block->before && block->before->state == block->state) {
        struct block *before = block->before;
        take_out(before);
        absorb(before, block);
        block = before;
    }
    put_in(block);
}

/* -- live blocks */

static struct block **link_to(size_t page) {
    struct block **link = &table[slot_of(page)];
    while (*link && (*link)->page != page) link = &(*link)->chain;
    return link;
}

void enter(struct block *block) {
    block->chain = table[slot_of(block->page)];
    table[slot_of(block->page)] = block;
    live_blocks++;
}

struct block *look_up(size_t page) { return *link_to(page); }

void leave(struct block *block) {
    *link_to(block->page) = block->chain;
    live_blocks--;
}
