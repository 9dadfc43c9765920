/* Addresses, devices, and what is charged to them. */
#include <unistd.h>

#include "gpu.h"

/* Arenas ----------------------------------------------------------------
 * Never-touched pages cost nothing, and the addresses don't depend on where other things are mapped, so that the
 * caching allocator's address-ordered choices repeat from run to run. They are reserved at their first use: the library
 * is preloaded in every child process too, compilers and shells among them, which need none of it.
 *
 * On a GPU they go down: the driver lets the kernel choose (an H100's calls, traced: mmap(0, size + 32 MiB - 4 KiB,
 * PROT_NONE), cuMemory/cuCtxCreate_nvtrace.log of github.com/derpsteb/libcuda-debug), and Linux's mmap begins at the top.
 * Of free blocks of one size torch 2.6 takes the lowest, so what it reserves depends on this; torch 2.14 the oldest. Not
 * modelled: what is smaller than 32 MiB shares such a range, and goes up within it. */

Device devices[MAX_DEVICES];
Arena host;
pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t reserved_once = PTHREAD_ONCE_INIT;

size_t round_up(size_t size, size_t to) { return (size + to - 1) / to * to; }

static void arena_reserve(Arena *arena, uintptr_t where, size_t span, size_t granule) {
  arena->base = mmap((void *)where, span, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (arena->base == MAP_FAILED) {
    fprintf(stderr, "virtual GPU: no %zu GiB of addresses: ", span >> 30);
    fprintf(stderr, "a limit (ulimit -v, -d) or vm.overcommit_memory=2 forbids it.\n");
    _Exit(2);
  }
  arena->span = span;
  arena->granule = granule;
}

/* Twice the memory for cudaMalloc, so that addresses never run out before bytes do. PyTorch reserves 1.125 times the
 * memory per expandable segment, of which there are two a stream: 28 streams, or 3 where addresses would run out. */
static void reserve_all(void) {
  size_t plain = round_up(2 * settings.memory, GRANULE), expandable = round_up((settings.memory > 1ull << 39 ? 8 : 64) * settings.memory, GRANULE);
  uintptr_t where = 0x200000000000;
  arena_reserve(&host, 0x100000000000, 1ull << 40, PAGE);
  for (int i = 0; i < settings.physical; i++, where += plain + expandable) {
    arena_reserve(&devices[i].memory, where, plain, GRANULE);
    arena_reserve(&devices[i].reserved, where + plain, expandable, GRANULE);
  }
}

int arena_has(const Arena *arena, const void *address) {
  return (char *)address >= arena->base && (char *)address < arena->base + arena->span;
}

/* The first gap that is large enough: its offset, and how many ranges lie below it. */
static int from_the_bottom(const Arena *arena, size_t size, size_t *below, size_t *offset) {
  size_t i, at = 0;
  for (i = 0; i < arena->count && arena->used[i].offset - at < size; i++)
    at = arena->used[i].offset + arena->used[i].size;
  return *below = i, *offset = at, at + size <= arena->span;
}
static int from_the_top(const Arena *arena, size_t size, size_t *below, size_t *offset) {
  size_t i, top = arena->span;
  for (i = arena->count; i > 0 && top - arena->used[i - 1].offset - arena->used[i - 1].size < size; i--)
    top = arena->used[i - 1].offset;
  return *below = i, *offset = top - size, top >= size;
}

void *arena_take(Arena *arena, size_t size) {
  pthread_once(&reserved_once, reserve_all);
  size = round_up(size ? size : 1, arena->granule);
  size_t i, at;
  if (!(settings.downward ? from_the_top : from_the_bottom)(arena, size, &i, &at)) return NULL;
  if (arena->count == arena->room) {
    arena->room = arena->room ? 2 * arena->room : 256;
    arena->used = realloc(arena->used, arena->room * sizeof(Range));
  }
  memmove(arena->used + i + 1, arena->used + i, (arena->count++ - i) * sizeof(Range));
  arena->used[i] = (Range){at, size};
  return arena->base + at;
}

static Range *arena_find(Arena *arena, const void *address) {
  size_t offset = (char *)address - arena->base, low = 0, high = arena->count;
  while (low < high) {
    size_t middle = (low + high) / 2;
    if (arena->used[middle].offset + arena->used[middle].size <= offset) low = middle + 1;
    else high = middle;
  }
  return low < arena->count && arena->used[low].offset <= offset ? arena->used + low : NULL;
}

/* Frees the range at that address (its pages read as zero from then on); returns its size, 0 if there is none. */
size_t arena_give(Arena *arena, void *address) {
  Range *range = arena_has(arena, address) ? arena_find(arena, address) : NULL;
  if (!range || arena->base + range->offset != (char *)address) return 0;
  size_t size = range->size;
  madvise(arena->base + range->offset, size, MADV_DONTNEED);
  memmove(range, range + 1, (arena->used + --arena->count - range) * sizeof(Range));
  return size;
}

/* Devices ---------------------------------------------------------------
 * A context takes its bytes when this process first does something with a device, not when it asks how many there are:
 * what NVML shows before that is the machine without this process. */

_Thread_local int current;
static int failing; /* fault injection: the next n allocations fail */

Device *device_of(int logical) { return &devices[settings.visible[logical]]; }

Device *enter(void) {
  Device *device = device_of(current);
  device->active = 1;
  return device;
}

size_t context_bytes(const Device *device) { return device->active ? settings.context + device->kernels : 0; }

size_t free_bytes(const Device *device) {
  size_t taken = context_bytes(device) + device->other + device->used;
  return taken < settings.memory ? settings.memory - taken : 0;
}

/* Takes bytes of the device's memory if they are free; call with the lock held. */
int charge(Device *device, size_t size) {
  if (failing > 0 ? failing-- : size > free_bytes(device)) return device->failures++, 0;
  device->used += size;
  if (device->used > device->peak) device->peak = device->used;
  return device->mallocs++, 1;
}

/* The physical device whose memory holds that address, or -1. */
int owner(const void *address) {
  for (int i = 0; i < settings.physical; i++)
    if (arena_has(&devices[i].memory, address) || arena_has(&devices[i].reserved, address)) return i;
  return -1;
}

/* Controls --------------------------------------------------------------
 * Called by control.py through ctypes, with physical device numbers, so that a test can play the neighbour. */

typedef struct { uint64_t used, peak, other, free, mallocs, frees, failures, launches; } Stats;

API int autoaccum_gpu_devices(void) { return settings.physical; }
API void autoaccum_gpu_stats(int physical, Stats *stats) {
  Device *d = &devices[physical];
  pthread_mutex_lock(&lock);
  *stats = (Stats){d->used, d->peak, d->other, free_bytes(d), d->mallocs, d->frees, d->failures, launches};
  pthread_mutex_unlock(&lock);
}
API void autoaccum_gpu_set_other(int physical, uint64_t bytes) {
  pthread_mutex_lock(&lock);
  devices[physical].other = bytes;
  pthread_mutex_unlock(&lock);
}
API void autoaccum_gpu_fail_next(int count) {
  pthread_mutex_lock(&lock);
  failing = count;
  pthread_mutex_unlock(&lock);
}
API void autoaccum_gpu_reset_peak(int physical) {
  pthread_mutex_lock(&lock);
  devices[physical].peak = devices[physical].used;
  pthread_mutex_unlock(&lock);
}
