/* The CUDA runtime: streams, events, graphs, kernels. Everything is done at once. AUTOACCUM_GPU_LAG plays a GPU that is
 * behind: a query of an event says "not ready" until so many kernels were launched after it, or until it is waited for. */
#include <time.h>

#include "gpu.h"

#define DONE(name, arguments) API cudaError_t name arguments { return cudaSuccess; }

/* Streams and events ---------------------------------------------------- */

struct CUstream_st { int priority, capturing; };
struct CUevent_st { struct timespec at; uint64_t launches; };
static struct CUstream_st default_stream;

/* Handles below 16 are the default streams (legacy 1, per-thread 2), not pointers. */
static struct CUstream_st *stream_of(cudaStream_t s) { return (uintptr_t)s < 16 ? &default_stream : s; }

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  if (!settings.logical) return fail(cudaErrorNoDevice);
  enter();
  *stream = calloc(1, sizeof **stream);
  (*stream)->priority = priority;
  return cudaSuccess;
}
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
API cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
API cudaError_t cudaStreamDestroy(cudaStream_t stream) { return free(stream), cudaSuccess; }
API cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  return *priority = stream_of(stream)->priority, cudaSuccess;
}
DONE(cudaStreamQuery, (cudaStream_t stream))
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait_for_all(), cudaSuccess; }
DONE(cudaStreamWaitEvent, (cudaStream_t stream, cudaEvent_t event, unsigned flags))
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *argument, unsigned flags) {
  return call(stream, cudaSuccess, argument), cudaSuccess;
}
API cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t call, void *argument) {
  return call(argument), cudaSuccess;
}

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  return *event = calloc(1, sizeof **event), cudaSuccess;
}
API cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t event) { return free(event), cudaSuccess; }
API cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->launches = launches;
  return clock_gettime(CLOCK_MONOTONIC, &event->at), cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}
static uint64_t waited_for; /* what was launched by then is done */
void wait_for_all(void) { waited_for = launches; }
API cudaError_t cudaEventQuery(cudaEvent_t event) {
  int done = event->launches <= waited_for || launches - event->launches >= settings.lag;
  return done || !settings.lag ? cudaSuccess : cudaErrorNotReady;
}
API cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (event->launches > waited_for) waited_for = event->launches;
  return cudaSuccess;
}
API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
  *ms = (b->at.tv_sec - a->at.tv_sec) * 1e3 + (b->at.tv_nsec - a->at.tv_nsec) / 1e6;
  return cudaSuccess;
}

/* Graphs ----------------------------------------------------------------
 * Capture only marks the stream, and a graph is empty. That suffices for the allocator's private pools: a graph's
 * memory is what was allocated during its capture. */

static int captures;
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = stream_of(stream)->capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
#if CUDART_VERSION < 13000
#define EDGES /* of a graph have no data of their own before CUDA 13 */
#else
#define EDGES const cudaGraphEdgeData **edges,
#endif
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                         unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                         EDGES size_t *count) {
  if (id) *id = stream_of(stream)->capturing;
  if (graph) *graph = NULL;
  if (nodes) *nodes = NULL;
#if CUDART_VERSION >= 13000
  if (edges) *edges = NULL;
#endif
  if (count) *count = 0;
  return cudaStreamIsCapturing(stream, status);
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  return stream_of(stream)->capturing = __atomic_add_fetch(&captures, 1, __ATOMIC_RELAXED), cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  stream_of(stream)->capturing = 0;
  return *graph = malloc(1), cudaSuccess;
}
DONE(cudaThreadExchangeStreamCaptureMode, (enum cudaStreamCaptureMode *mode))
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
  return *count = 1, cudaSuccess; /* 0 makes PyTorch warn that the graph is empty */
}
API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *run, cudaGraph_t graph, unsigned long long flags) {
  return *run = malloc(1), cudaSuccess;
}
DONE(cudaGraphLaunch, (cudaGraphExec_t run, cudaStream_t stream))
API cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return free(graph), cudaSuccess; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t run) { return free(run), cudaSuccess; }

/* Kernels ---------------------------------------------------------------
 * What the compiler writes at a library's start registers its kernels; kernel<<<grid, block, shared, stream>>>() pushes
 * a configuration, which the compiler's host stub pops before it launches. */

API void **__cudaRegisterFatBinary(void *binary) { return malloc(sizeof(void *)); }
API void __cudaRegisterFatBinaryEnd(void **handle) {}
API void __cudaUnregisterFatBinary(void **handle) { free(handle); }
API void __cudaRegisterFunction(void **handle, const char *host_function, char *device_function, const char *name,
                                int limit, uint3 *tid, uint3 *bid, dim3 *block, dim3 *grid, int *size) {}
API void __cudaRegisterVar(void **handle, char *variable, char *address, const char *name, int ext, size_t size,
                           int constant, int global) {}
API char __cudaInitModule(void **handle) { return 1; }

static _Thread_local struct { dim3 grid, block; size_t shared; void *stream; } pushed;
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
  pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *(void **)stream = pushed.stream;
  return cudaSuccess;
}

/* Kernels are loaded at their first launch (CUDA_MODULE_LOADING=LAZY, the default), into memory of the context's, which
 * nobody gets back. Where there is none, the launch fails. */
#define MOST_KERNELS 65536
static int load(Device *device, const void *kernel) {
  static const void *loaded[MOST_KERNELS];
  static size_t count;
  size_t at = ((uintptr_t)kernel >> 4) * 0x9e3779b97f4a7c15ull >> 48;
  while (loaded[at] && loaded[at] != kernel) at = (at + 1) % MOST_KERNELS;
  if (loaded[at] || count > MOST_KERNELS / 2) return 1;
  if (settings.kernel > free_bytes(device)) return 0;
  loaded[at] = kernel;
  device->kernels += settings.kernel;
  return count++, 1;
}

uint64_t launches;
cudaError_t launch(const void *kernel) {
  Device *device = enter();
  int has_room = 1;
  __atomic_add_fetch(&launches, 1, __ATOMIC_RELAXED);
  if (!settings.kernel || !kernel) return cudaSuccess;
  pthread_mutex_lock(&lock);
  has_room = load(device, kernel);
  pthread_mutex_unlock(&lock);
  return has_room ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  return *kernel = (cudaKernel_t)function, cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                                   cudaStream_t stream) {
  return launch(kernel);
}
API cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                 cudaStream_t stream) {
  return launch(function);
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
  return launch(function);
}
API cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments,
                                            size_t shared, cudaStream_t stream) {
  return launch(function);
}

/* The version of the code that a device loads, by which CUB chooses its kernels; of others than it was compiled for it
 * reports an unknown error. PyTorch's builds have code for 8.6, which 8.7 and 8.9 load, for 10.0 and for 12.0. */
static int code_version(void) {
  int cc = 10 * settings.cc_major + settings.cc_minor;
  return cc == 87 || cc == 89 ? 86 : cc > 90 ? cc / 10 * 10 : cc;
}
API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *function) {
  int cc = code_version();
  *a = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024, .numRegs = 32, .ptxVersion = cc, .binaryVersion = cc,
                                   .maxDynamicSharedSizeBytes = 49152};
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute which, int value) {
  int too_much = which == cudaFuncAttributeMaxDynamicSharedMemorySize && (size_t)value > settings.shared_optin;
  return too_much ? fail(cudaErrorInvalidValue) : cudaSuccess;
}
API cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, enum cudaFuncAttribute which, int value,
                                                int logical) {
  return cudaFuncSetAttribute(kernel, which, value);
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *function, int block,
                                                                       size_t shared, unsigned flags) {
  int threads = attribute(cudaDevAttrMaxThreadsPerMultiProcessor, 0);
  *count = block > 0 && threads / block < 32 ? threads / block : 32;
  if (*count < 1) *count = 1;
  return cudaSuccess;
}
