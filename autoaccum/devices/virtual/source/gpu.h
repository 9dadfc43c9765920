/* The virtual GPU: a CUDA runtime without a GPU, under an unmodified CUDA build of PyTorch.
 *
 * One library, preloaded in front of libcudart, libcublas(Lt), libcudnn, libcusparse, libcufft and libcusolver, and
 * found by dlopen as libcuda.so.1 and libnvidia-ml.so.1. Kernels do nothing; device memory is host memory that is
 * committed when touched, counted against a limit.
 *
 * The rule: whatever is not modelled here fails with its library's "not supported" (stubs.py writes those functions),
 * so that a gap is seen and never silently wrong.
 *
 * settings.c  what the environment asks for          memory.c  addresses, devices, what is charged; controls
 * runtime.c   cudart: devices, errors, memory        work.c    cudart: streams, events, graphs, kernels
 * driver.c    libcuda: expandable segments, modules  blas.c, dnn.c, rnn.c, nvml.c   those libraries
 * ending.c    how a process ends
 */
#pragma once
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <cuda.h>
#include <cuda_runtime_api.h>

#define MAX_DEVICES 8
#define PAGE 4096ull
#define GRANULE (2ull << 20) /* the driver hands out device memory in 2 MiB pages */
#define API __attribute__((visibility("default")))

/* Device numbers are of two kinds: logical ones, which CUDA counts (CUDA_VISIBLE_DEVICES), and physical ones, which
 * NVML and the controls count. */
typedef struct {
  int physical;                /* devices that the machine has */
  int visible[MAX_DEVICES];    /* visible[logical] = physical */
  int logical;                 /* devices that CUDA shows */
  size_t memory, context, other;
  int cc_major, cc_minor, multiprocessors;
  size_t shared_optin;         /* the most shared memory that a block may ask for */
  const char *name;
  size_t workspace;            /* of a convolution: bytes, or a factor of its tensors' bytes */
  double workspace_factor;
  int workspace_transposed;    /* or copies of its tensors with channels last: dnn.c */
  int fallback;                /* an engine without workspace is offered beside the one with */
  size_t trial;                /* cudnn.benchmark tries an engine with that workspace, and takes another */
  size_t kernel;               /* the context grows by that at a kernel's first launch */
  uint64_t lag;                /* work is done when that many more kernels were launched, or it was waited for */
  int downward;                /* later memory lies below earlier memory */
  enum { COPY_TENSORS, COPY_ALL, COPY_ZERO } copies;
} Settings;
extern Settings settings;
void uuid_of(int physical, unsigned char bytes[16]);
void uuid_text(int physical, char text[48]); /* "GPU-xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx" */

/* One reserved range of addresses, handed out first fit, from the bottom or the top. */
typedef struct { size_t offset, size; } Range;
typedef struct {
  char *base;
  size_t span, granule;
  Range *used; /* sorted by offset */
  size_t count, room;
} Arena;
int arena_has(const Arena *arena, const void *address);
void *arena_take(Arena *arena, size_t size);
size_t arena_give(Arena *arena, void *address);

typedef struct {
  Arena memory;             /* cudaMalloc */
  Arena reserved;           /* cuMemAddressReserve: addresses only */
  int active;               /* this process has a context on it */
  size_t used, peak, other; /* this process; its high-water mark; other processes */
  size_t kernels;           /* loaded by now, beside the context */
  uint64_t mallocs, frees, failures;
} Device;
extern Device devices[MAX_DEVICES];
extern Arena host; /* pinned host memory */
extern pthread_mutex_t lock;
extern uint64_t launches;
extern _Thread_local int current; /* logical */

Device *device_of(int logical);
Device *enter(void); /* the current device, which has a context from then on */
size_t free_bytes(const Device *device);
size_t context_bytes(const Device *device);
int charge(Device *device, size_t size);
int owner(const void *address);
size_t round_up(size_t size, size_t to);

cudaError_t fail(cudaError_t error); /* what cudaGetLastError will say */
cudaError_t launch(const void *kernel); /* NULL: one that is always there */
void wait_for_all(void);
int attribute(int which, int logical);
