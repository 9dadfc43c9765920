/* The CUDA runtime: devices, errors, memory. */
#include "gpu.h"

/* Calls that have nothing to do here: all work is done at once, and all devices share one address space. */
#define DONE(name, arguments) API cudaError_t name arguments { return cudaSuccess; }

/* Devices and errors ---------------------------------------------------- */

static _Thread_local cudaError_t last_error;
cudaError_t fail(cudaError_t error) { return last_error = error; }

static const struct { cudaError_t code; const char *name, *text; } errors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNotSupported, "cudaErrorNotSupported", "operation not supported (not modelled by the virtual GPU)"},
    {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"},
};
static int error_at(cudaError_t error) {
  int i = 0, last = sizeof errors / sizeof *errors - 1;
  while (i < last && errors[i].code != error) i++;
  return i;
}
API const char *cudaGetErrorName(cudaError_t error) { return errors[error_at(error)].name; }
API const char *cudaGetErrorString(cudaError_t error) { return errors[error_at(error)].text; }
API cudaError_t cudaPeekAtLastError(void) { return last_error; }
API cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

static int is_device(int logical) { return logical >= 0 && logical < settings.logical; }

API cudaError_t cudaGetDeviceCount(int *count) {
  *count = settings.logical;
  return settings.logical ? cudaSuccess : fail(cudaErrorNoDevice);
}
API cudaError_t cudaGetDevice(int *logical) {
  *logical = current;
  return settings.logical ? cudaSuccess : fail(cudaErrorNoDevice);
}
API cudaError_t cudaSetDevice(int logical) {
  if (!is_device(logical)) return fail(cudaErrorInvalidDevice);
  current = logical;
  enter(); /* since CUDA 12 */
  return cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize(void) { return wait_for_all(), cudaSuccess; }
DONE(cudaDeviceEnablePeerAccess, (int logical, unsigned flags))
DONE(cudaProfilerStart, (void))
DONE(cudaProfilerStop, (void))
API cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, cudaSuccess; }
API cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { return *can = a != b, cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int logical) {
  if (!is_device(logical)) return fail(cudaErrorInvalidDevice);
  snprintf(text, length, "0000:%02X:00.0", settings.visible[logical] + 1);
  return cudaSuccess;
}

API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int logical) {
  if (!is_device(logical)) return fail(cudaErrorInvalidDevice);
  int cc = 10 * settings.cc_major + settings.cc_minor;
  *p = (struct cudaDeviceProp){
      .totalGlobalMem = settings.memory, .sharedMemPerBlock = 49152, .regsPerBlock = 65536, .warpSize = 32,
      .memPitch = 2147483647, .maxThreadsPerBlock = 1024, .maxThreadsDim = {1024, 1024, 64},
      .maxGridSize = {2147483647, 65535, 65535}, .totalConstMem = 65536,
      .major = settings.cc_major, .minor = settings.cc_minor, .textureAlignment = 512, .texturePitchAlignment = 32,
      .multiProcessorCount = settings.multiprocessors, .canMapHostMemory = 1, .concurrentKernels = 1,
      .pciBusID = settings.visible[logical] + 1, .asyncEngineCount = 3, .unifiedAddressing = 1, .memoryBusWidth = 5120,
      .l2CacheSize = 40 << 20,
      .maxThreadsPerMultiProcessor = cc == 75 ? 1024 : cc == 86 || cc == 89 || cc >= 120 ? 1536 : 2048,
      .streamPrioritiesSupported = 1, .sharedMemPerMultiprocessor = settings.shared_optin + 1024,
      .regsPerMultiprocessor = 65536, .cooperativeLaunch = 1, .sharedMemPerBlockOptin = settings.shared_optin,
      .maxBlocksPerMultiProcessor = 32, .reservedSharedMemPerBlock = 1024};
  snprintf(p->name, sizeof p->name, "%s", settings.name);
  uuid_of(settings.visible[logical], (unsigned char *)p->uuid.bytes);
  return cudaSuccess;
}

int attribute(int which, int logical) {
  struct cudaDeviceProp p = {0};
  cudaGetDeviceProperties(&p, logical);
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: return p.maxThreadsPerBlock;
    case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return p.maxGridSize[0];
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return p.sharedMemPerBlock;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return p.sharedMemPerBlockOptin;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return p.sharedMemPerMultiprocessor;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return p.maxThreadsPerMultiProcessor;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMultiProcessorCount: return settings.multiprocessors;
    case cudaDevAttrComputeCapabilityMajor: return settings.cc_major;
    case cudaDevAttrComputeCapabilityMinor: return settings.cc_minor;
    case cudaDevAttrL2CacheSize: return p.l2CacheSize;
    case cudaDevAttrClockRate: return 1410000;
    case cudaDevAttrMemoryClockRate: return 1215000;
    case cudaDevAttrGlobalMemoryBusWidth: return p.memoryBusWidth;
    case cudaDevAttrPciBusId: return p.pciBusID;
    case cudaDevAttrUnifiedAddressing: case cudaDevAttrConcurrentKernels: case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrStreamPrioritiesSupported: case cudaDevAttrCanMapHostMemory: case cudaDevAttrMemoryPoolsSupported:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: return 1;
    default: return 0;
  }
}
API cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int logical) {
  if (!is_device(logical)) return fail(cudaErrorInvalidDevice);
  return *value = attribute(which, logical), cudaSuccess;
}

/* Device memory --------------------------------------------------------- */

API cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
  if (!settings.logical) return fail(cudaErrorNoDevice);
  pthread_mutex_lock(&lock);
  *free = free_bytes(enter());
  pthread_mutex_unlock(&lock);
  return *total = settings.memory, cudaSuccess;
}
API cudaError_t cudaMalloc(void **address, size_t size) {
  if (!settings.logical) return fail(cudaErrorNoDevice);
  Device *device = enter();
  *address = NULL;
  if (!size) return cudaSuccess;
  if (size > settings.memory) return fail(cudaErrorMemoryAllocation);
  size = round_up(size, GRANULE);
  pthread_mutex_lock(&lock);
  if (charge(device, size) && !(*address = arena_take(&device->memory, size))) device->used -= size;
  pthread_mutex_unlock(&lock);
  return *address ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
API cudaError_t cudaFree(void *address) {
  if (!address) return cudaSuccess;
  int physical = owner(address);
  if (physical < 0) return fail(cudaErrorInvalidValue);
  pthread_mutex_lock(&lock);
  size_t size = arena_give(&devices[physical].memory, address);
  devices[physical].used -= size;
  devices[physical].frees += size > 0;
  pthread_mutex_unlock(&lock);
  return size ? cudaSuccess : fail(cudaErrorInvalidValue);
}

/* PyTorch's cudaMallocAsync backend: one pool a device, which gives everything back at once. */
API cudaError_t cudaMallocAsync(void **address, size_t size, cudaStream_t stream) { return cudaMalloc(address, size); }
API cudaError_t cudaFreeAsync(void *address, cudaStream_t stream) { return cudaFree(address); }
API cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int logical) {
  if (!is_device(logical)) return fail(cudaErrorInvalidDevice);
  return *pool = (cudaMemPool_t)device_of(logical), cudaSuccess;
}
static int is_peak(enum cudaMemPoolAttr which) {
  return which == cudaMemPoolAttrUsedMemHigh || which == cudaMemPoolAttrReservedMemHigh;
}
API cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr which, void *value) {
  if (is_peak(which)) ((Device *)pool)->peak = ((Device *)pool)->used;
  return cudaSuccess;
}
API cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr which, void *value) {
  *(uint64_t *)value = is_peak(which) ? ((Device *)pool)->peak : ((Device *)pool)->used;
  return cudaSuccess;
}
DONE(cudaMemPoolSetAccess, (cudaMemPool_t pool, const struct cudaMemAccessDesc *list, size_t count))
DONE(cudaMemPoolTrimTo, (cudaMemPool_t pool, size_t keep))

/* Pinned host memory: a separate arena, which distinguishes it from other memory. */
API cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) {
  if (settings.logical) enter();
  pthread_mutex_lock(&lock);
  *address = arena_take(&host, size);
  pthread_mutex_unlock(&lock);
  return *address ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
API cudaError_t cudaFreeHost(void *address) {
  pthread_mutex_lock(&lock);
  size_t size = arena_give(&host, address);
  pthread_mutex_unlock(&lock);
  return size || !address ? cudaSuccess : fail(cudaErrorInvalidValue);
}
DONE(cudaHostRegister, (void *address, size_t size, unsigned flags))
DONE(cudaHostUnregister, (void *address))

API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *address) {
  int physical = owner(address);
  void *p = (void *)address;
  *a = (struct cudaPointerAttributes){.type = cudaMemoryTypeUnregistered, .device = -2, .hostPointer = p};
  if (physical >= 0) {
    *a = (struct cudaPointerAttributes){.type = cudaMemoryTypeDevice, .devicePointer = p};
    while (a->device < settings.logical && settings.visible[a->device] != physical) a->device++;
  } else if (arena_has(&host, address)) {
    *a = (struct cudaPointerAttributes){cudaMemoryTypeHost, current, p, p};
  }
  return cudaSuccess;
}

/* Copies ----------------------------------------------------------------
 * They are real, so that tensors put on the device come back. But a scalar that the host reads is nearly always a
 * kernel's result (a loss, a count), whose memory may hold what an earlier tensor left there, so it reads as zero,
 * unless AUTOACCUM_GPU_COPIES=all. With "zero" nothing is copied and every read gives zeros. */

#define SCALAR 16
static cudaError_t copy(void *to, const void *from, size_t size) {
  int onto = owner(to) >= 0, off = owner(from) >= 0;
  int hidden = settings.copies == COPY_ZERO || (settings.copies == COPY_TENSORS && size <= SCALAR);
  if (off && !onto && hidden) memset(to, 0, size);
  else if (settings.copies != COPY_ZERO || !onto) memmove(to, from, size);
  return cudaSuccess;
}
API cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  return copy(to, from, size);
}
API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind,
                                cudaStream_t stream) {
  return copy(to, from, size);
}
API cudaError_t cudaMemcpyPeerAsync(void *to, int td, const void *from, int fd, size_t size, cudaStream_t stream) {
  return copy(to, from, size);
}
API cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                                  size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
  for (size_t i = 0; i < height; i++) copy((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
  return cudaSuccess;
}

/* Zeroing whole pages gives them back to the machine: they read as zero, and cost nothing until written again. */
API cudaError_t cudaMemset(void *address, int value, size_t size) {
  char *begin = address, *end = begin + size;
  char *first = (char *)round_up((uintptr_t)begin, PAGE), *last = (char *)((uintptr_t)end & ~(PAGE - 1));
  if (value || last <= first || owner(address) < 0) {
    memset(begin, value, size);
    return cudaSuccess;
  }
  memset(begin, 0, first - begin);
  madvise(first, last - first, MADV_DONTNEED);
  memset(last, 0, end - last);
  return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void *address, int value, size_t size, cudaStream_t stream) {
  return cudaMemset(address, value, size);
}

/* One space stands for every __device__ variable: PyTorch only writes to them. */
static char symbols[1 << 16];
API cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) { return *address = symbols, cudaSuccess; }
DONE(cudaMemcpyToSymbol, (const void *symbol, const void *from, size_t size, size_t offset, enum cudaMemcpyKind kind))
