/* The page cache's list of blocks by address, its free blocks by size, and its live ones by address (blocks.c). */
#ifndef AUTOACCUM_BLOCKS_H
#define AUTOACCUM_BLOCKS_H

#include <stdbool.h>
#include <stddef.h>

enum state {
    LIVE,   /* in use */
    CACHED, /* free and committed */
    EMPTY,  /* reserved addresses without pages */
    LOST    /* addresses that someone else's mapping came to lie in */
};

struct block {
    struct block *before, *after; /* its neighbours by address */
    struct block *chain;          /* the next in its slot of the table, or in the list of unused records */
    size_t page, pages;
    enum state state;
};

struct index { /* free blocks by size, then address */
    struct block **blocks;
    size_t count, capacity;
};

extern struct index cached, empty;

bool room(void);                                                  /* for one change of them all */
struct block *record(size_t page, size_t pages, enum state state);
size_t place(const struct index *index, size_t pages, size_t page);
void put_in(struct block *block);
void take_out(struct block *block);
struct block *cut(struct block *block, size_t pages);
void absorb(struct block *block, struct block *after);
void settle(struct block *block);
void enter(struct block *block);                                  /* into the table of live blocks */
struct block *look_up(size_t page);
void leave(struct block *block);

#endif
