/* The C library's functions for blocks of any size, with the page cache behind the large ones.
 *
 * PyTorch takes each tensor's memory with posix_memalign and gives it back with free (c10/core/impl/alloc_cpu.cpp).
 * Preloaded into a process, this library's functions stand in for the C library's everywhere. Loaded into a process
 * that runs already, it can still stand in where libc10.so calls them: autoaccum_cache_join.
 *
 * Smaller blocks, malloc, and larger alignments than a page stay the C library's.
 */
#define _GNU_SOURCE
#include "cache.h"

#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <link.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static bool is_serving;

/* -- the functions that come next: the C library's, as a rule */

static struct {
    int (*posix_memalign)(void **, size_t, size_t);
    void *(*malloc)(size_t);
    void *(*realloc)(void *, size_t);
    size_t (*usable)(void *);
    void (*free)(void *); /* found last */
} next;
static __thread bool is_looking __attribute__((tls_model("initial-exec")));

/* Look them up; false while that is under way in this thread (dlsym may free something of its own). */
static bool found_next(void) {
    if (__atomic_load_n(&next.free, __ATOMIC_ACQUIRE)) return true;
    if (is_looking) return false;
    is_looking = true;
    *(void **)&next.posix_memalign = dlsym(RTLD_NEXT, "posix_memalign");
    *(void **)&next.malloc = dlsym(RTLD_NEXT, "malloc");
    *(void **)&next.realloc = dlsym(RTLD_NEXT, "realloc");
    *(void **)&next.usable = dlsym(RTLD_NEXT, "malloc_usable_size");
    __atomic_store_n((void **)&next.free, dlsym(RTLD_NEXT, "free"), __ATOMIC_RELEASE);
    is_looking = false;
    return true;
}

static int take_aligned(void **pointer, size_t alignment, size_t bytes) {
    if (bytes >= CACHE_THRESHOLD && __atomic_load_n(&is_serving, __ATOMIC_RELAXED) && alignment &&
        alignment % sizeof(void *) == 0 && !(alignment & (alignment - 1)) && alignment <= (size_t)getpagesize()) {
        int error = errno;
        void *found = cache_allocate(bytes);
        errno = error;
        if (found) {
            *pointer = found;
            return 0;
        }
    }
    if (!found_next()) return ENOMEM;
    int error = next.posix_memalign(pointer, alignment, bytes);
    if (error != ENOMEM) return error;
    autoaccum_cache_trim(); /* a limit: what lies free here may be what lacks there */
    return next.posix_memalign(pointer, alignment, bytes);
}

static void release(void *pointer) {
    if (!cache_free(pointer) && found_next()) next.free(pointer);
}

static size_t usable_size(void *pointer) {
    size_t bytes = cache_bytes(pointer);
    return bytes || !found_next() ? bytes : next.usable(pointer);
}

static void *resize(void *pointer, size_t bytes) {
    size_t old = cache_bytes(pointer), page = (size_t)getpagesize();
    if (!found_next()) return NULL;
    if (!old) return next.realloc(pointer, bytes);
    if (!bytes) {
        cache_free(pointer);
        return NULL;
    }
    if (bytes <= old && bytes > old - page) return pointer;
    void *found = bytes >= CACHE_THRESHOLD ? cache_allocate(bytes) : NULL;
    if (!found) found = next.malloc(bytes);
    if (!found) return NULL;
    memcpy(found, pointer, bytes < old ? bytes : old);
    cache_free(pointer);
    return found;
}

static void *resize_array(void *pointer, size_t count, size_t bytes) {
    size_t all;
    if (__builtin_mul_overflow(count, bytes, &all)) {
        errno = ENOMEM;
        return NULL;
    }
    return resize(pointer, all);
}

/* By these names the rest of the process finds them. Here they have other names: what this library calls `free` is
 * whichever stands first in the process. */
#define STANDS_FOR(own) __attribute__((visibility("default"), alias(#own)))
STANDS_FOR(take_aligned) int posix_memalign(void **, size_t, size_t);
STANDS_FOR(release) void free(void *);
STANDS_FOR(usable_size) size_t malloc_usable_size(void *);
STANDS_FOR(resize) void *realloc(void *, size_t);
STANDS_FOR(resize_array) void *reallocarray(void *, size_t, size_t);

/* -- preloaded, or joined later */

/* Serve large blocks from now on, or leave them to the C library. Those that were handed out stay valid. */
PUBLIC void autoaccum_cache_serve(bool serve) { __atomic_store_n(&is_serving, serve, __ATOMIC_RELAXED); }

PUBLIC bool autoaccum_cache_serves(void) { return __atomic_load_n(&is_serving, __ATOMIC_RELAXED); }

__attribute__((constructor)) static void start(void) {
    found_next();
    is_serving = dlsym(RTLD_DEFAULT, "posix_memalign") == (void *)take_aligned; /* preloaded */
    pthread_atfork(cache_lock, cache_unlock, cache_unlock);
}

struct slots {
    void **allocate[4], **release[4]; /* where libc10.so keeps the functions' addresses */
    size_t allocates, releases;
    uintptr_t relro, relro_end; /* read-only since it was loaded */
};

static void look_through(struct slots *found, uintptr_t base, const ElfW(Rela) * entries, size_t bytes,
                         const ElfW(Sym) * symbols, const char *names) {
    for (size_t i = 0; entries && i < bytes / sizeof *entries; i++) {
        const char *name = names + symbols[ELF64_R_SYM(entries[i].r_info)].st_name;
        void **slot = (void **)(base + entries[i].r_offset);
        if (!strcmp(name, "posix_memalign") && found->allocates < 4) found->allocate[found->allocates++] = slot;
        if (!strcmp(name, "free") && found->releases < 4) found->release[found->releases++] = slot;
    }
}

static int look_in(struct dl_phdr_info *info, size_t size, void *data) {
    (void)size;
    struct slots *found = data;
    const char *name = strrchr(info->dlpi_name, '/');
    if (strcmp(name ? name + 1 : info->dlpi_name, "libc10.so")) return 0;
    const ElfW(Rela) *plt = NULL, *other = NULL;
    const ElfW(Sym) *symbols = NULL;
    const char *names = NULL;
    size_t plt_bytes = 0, other_bytes = 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *part = &info->dlpi_phdr[i];
        if (part->p_type == PT_GNU_RELRO) {
            found->relro = info->dlpi_addr + part->p_vaddr;
            found->relro_end = found->relro + part->p_memsz;
        }
        if (part->p_type != PT_DYNAMIC) continue;
        for (const ElfW(Dyn) *entry = (void *)(info->dlpi_addr + part->p_vaddr); entry->d_tag != DT_NULL; entry++) {
            const void *at = (void *)entry->d_un.d_ptr; /* glibc has added the base address */
            if (entry->d_tag == DT_JMPREL) plt = at;
            if (entry->d_tag == DT_PLTRELSZ) plt_bytes = entry->d_un.d_val;
            if (entry->d_tag == DT_RELA) other = at;
            if (entry->d_tag == DT_RELASZ) other_bytes = entry->d_un.d_val;
            if (entry->d_tag == DT_SYMTAB) symbols = at;
            if (entry->d_tag == DT_STRTAB) names = at;
        }
    }
    if (symbols && names) {
        look_through(found, info->dlpi_addr, plt, plt_bytes, symbols, names);
        look_through(found, info->dlpi_addr, other, other_bytes, symbols, names);
    }
    return 1;
}

static bool put_into(const struct slots *found, void **slot, void *function) {
    uintptr_t page = (uintptr_t)getpagesize(), start = (uintptr_t)slot & ~(page - 1);
    if (mprotect((void *)start, page, PROT_READ | PROT_WRITE)) return false;
    __atomic_store_n(slot, function, __ATOMIC_RELEASE);
    if (start >= (found->relro & ~(page - 1)) && start + page <= ((found->relro_end) & ~(page - 1)))
        mprotect((void *)start, page, PROT_READ); /* as the loader left it */
    return true;
}

/* Stand in where libc10.so, and nobody else, takes and frees memory. What it took before is freed as before. */
PUBLIC bool autoaccum_cache_join(void) {
    struct slots found = {0};
    dl_iterate_phdr(look_in, &found);
    if (!found.allocates || !found.releases) return false;
    for (size_t i = 0; i < found.releases; i++) /* first: what is taken from now on can be freed */
        if (!put_into(&found, found.release[i], (void *)release)) return false;
    for (size_t i = 0; i < found.allocates; i++)
        if (!put_into(&found, found.allocate[i], (void *)take_aligned)) return false;
    autoaccum_cache_serve(true);
    return true;
}
