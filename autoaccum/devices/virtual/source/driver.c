/* The driver: contexts, expandable segments, and kernels that are compiled at run time. */
#include <dlfcn.h>

#include "gpu.h"

#define DONE(name, arguments) API CUresult name arguments { return CUDA_SUCCESS; }

/* Entry points ----------------------------------------------------------
 * Those of this library, stubs included. cuda.h gives the newest variant of a function the suffix _v2 or later. */

static void *entry_point(const char *name) {
  char versioned[128];
  void *found = NULL;
  for (int version = 4; !found && version > 1; version--) {
    snprintf(versioned, sizeof versioned, "%s_v%d", name, version);
    found = dlsym(RTLD_DEFAULT, versioned);
  }
  return found ? found : dlsym(RTLD_DEFAULT, name);
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                                 unsigned long long flags,
                                                 enum cudaDriverEntryPointQueryResult *status) {
  *function = entry_point(name);
  if (status) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
#if CUDART_VERSION < 13000
API cudaError_t cudaGetDriverEntryPoint(const char *name, void **function, unsigned long long flags,
                                        enum cudaDriverEntryPointQueryResult *status) {
  return cudaGetDriverEntryPointByVersion(name, function, CUDART_VERSION, flags, status);
}
#endif
API CUresult cuGetProcAddress(const char *name, void **function, int version, cuuint64_t flags,
                              CUdriverProcAddressQueryResult *status) {
  *function = entry_point(name);
  if (status) *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

/* Devices and contexts: a context is its device --------------------------- */

static CUresult checked(int logical) {
  return logical >= 0 && logical < settings.logical ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
API CUresult cuInit(unsigned flags) { return settings.logical ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE; }
API CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
API CUresult cuDeviceGetCount(int *count) { return *count = settings.logical, CUDA_SUCCESS; }
API CUresult cuDeviceGet(CUdevice *device, int logical) { return *device = logical, checked(logical); }
API CUresult cuDeviceGetName(char *text, int length, CUdevice device) {
  return snprintf(text, length, "%s", settings.name), checked(device);
}
API CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) {
  if (!checked(device)) uuid_of(settings.visible[device], (unsigned char *)uuid->bytes);
  return checked(device);
}
#ifndef cuDeviceGetUuid /* from CUDA 13 on that is _v2's name; before it both are there, for MIG */
API CUresult cuDeviceGetUuid_v2(CUuuid *uuid, CUdevice device) { return cuDeviceGetUuid(uuid, device); }
#endif
API CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) { return *bytes = settings.memory, checked(device); }
API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute which, CUdevice device) {
  return *value = attribute((int)which, device), checked(device);
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  if (checked(device)) return checked(device);
  return *flags = 0, *active = device_of(device)->active, CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  if (checked(device)) return checked(device);
  device_of(device)->active = 1;
  return *context = (CUcontext)device_of(device), CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext *context) {
  if (!settings.logical) return CUDA_ERROR_NO_DEVICE;
  return *context = device_of(current)->active ? (CUcontext)device_of(current) : NULL, CUDA_SUCCESS;
}
API CUresult cuCtxSetCurrent(CUcontext context) {
  for (int i = 0; i < settings.logical; i++)
    if ((CUcontext)device_of(i) == context) current = i;
  return CUDA_SUCCESS;
}
API CUresult cuCtxGetDevice(CUdevice *device) { return *device = current, cuInit(0); }
API CUresult cuGetErrorName(CUresult error, const char **text) {
  return *text = cudaGetErrorName((cudaError_t)error), CUDA_SUCCESS; /* the two enumerations share their numbers */
}
API CUresult cuGetErrorString(CUresult error, const char **text) {
  return *text = cudaGetErrorString((cudaError_t)error), CUDA_SUCCESS;
}
#if CUDA_VERSION >= 13000
/* PyTorch asks for errors that the driver logs: there are none. */
DONE(cuLogsRegisterCallback, (CUlogsCallback call, void *data, CUlogsCallbackHandle *handle))
DONE(cuLogsUnregisterCallback, (CUlogsCallbackHandle handle))
#endif
API CUresult cuPointerGetAttribute(void *value, CUpointer_attribute which, CUdeviceptr address) {
  struct cudaPointerAttributes a;
  cudaPointerGetAttributes(&a, (void *)address);
  if (a.type == cudaMemoryTypeUnregistered) return CUDA_ERROR_INVALID_VALUE;
  switch (which) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)value = (CUcontext)device_of(a.device); break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: *(unsigned *)value = a.type; break; /* host 1, device 2 in both */
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)value = address; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)value = a.device; break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
  }
  return CUDA_SUCCESS;
}

/* Expandable segments ---------------------------------------------------
 * A physical handle is charged when it is created and freed when it is released. Where it is mapped needs no doing:
 * reserved addresses are memory already. Not modelled: one handle mapped twice. */

typedef struct { Device *device; size_t size; } Handle;

API CUresult cuMemGetAllocationGranularity(size_t *bytes, const CUmemAllocationProp *wanted,
                                           CUmemAllocationGranularity_flags flags) {
  return *bytes = GRANULE, CUDA_SUCCESS;
}
API CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size, const CUmemAllocationProp *wanted,
                         unsigned long long flags) {
  if (checked(wanted->location.id)) return checked(wanted->location.id);
  Device *device = device_of(wanted->location.id);
  device->active = 1;
  pthread_mutex_lock(&lock);
  int fits = charge(device, size);
  pthread_mutex_unlock(&lock);
  if (!fits) return CUDA_ERROR_OUT_OF_MEMORY;
  Handle *made = malloc(sizeof *made);
  *made = (Handle){device, size};
  return *handle = (uintptr_t)made, CUDA_SUCCESS;
}
API CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  Handle *made = (Handle *)(uintptr_t)handle;
  pthread_mutex_lock(&lock);
  made->device->used -= made->size;
  made->device->frees++;
  pthread_mutex_unlock(&lock);
  return free(made), CUDA_SUCCESS;
}
API CUresult cuMemAddressReserve(CUdeviceptr *address, size_t size, size_t alignment, CUdeviceptr hint,
                                 unsigned long long flags) {
  if (!settings.logical) return CUDA_ERROR_NO_DEVICE;
  pthread_mutex_lock(&lock);
  *address = (CUdeviceptr)arena_take(&device_of(current)->reserved, size);
  pthread_mutex_unlock(&lock);
  return *address ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
API CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
  int physical = owner((void *)address);
  if (physical < 0) return CUDA_ERROR_INVALID_VALUE;
  pthread_mutex_lock(&lock);
  arena_give(&devices[physical].reserved, (void *)address);
  pthread_mutex_unlock(&lock);
  return CUDA_SUCCESS;
}
DONE(cuMemMap, (CUdeviceptr address, size_t size, size_t offset, CUmemGenericAllocationHandle handle,
                unsigned long long flags))
DONE(cuMemSetAccess, (CUdeviceptr address, size_t size, const CUmemAccessDesc *access, size_t count))
API CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
  return madvise((void *)address, size, MADV_DONTNEED), CUDA_SUCCESS;
}

/* Modules ---------------------------------------------------------------
 * Kernels that Triton or NVRTC compiled (for real) are loaded and launched: they do nothing, like all others. The image
 * isn't read, so a kernel's registers and shared memory are made up: few enough that a block always fits. */

API CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (!settings.logical) return CUDA_ERROR_NO_DEVICE;
  enter();
  return *module = malloc(1), CUDA_SUCCESS;
}
API CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options,
                                void **values) {
  return cuModuleLoadData(module, image);
}
API CUresult cuModuleLoad(CUmodule *module, const char *path) { return cuModuleLoadData(module, path); }
API CUresult cuModuleUnload(CUmodule module) { return free(module), CUDA_SUCCESS; }
API CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  static char any_kernel;
  return *function = (CUfunction)&any_kernel, CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute which, CUfunction function) {
  struct cudaFuncAttributes a;
  cudaFuncGetAttributes(&a, function);
  switch (which) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = a.maxThreadsPerBlock; break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = a.numRegs; break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION: case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *value = a.binaryVersion; break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = a.maxDynamicSharedSizeBytes; break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}
API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  int too_much = which == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && (size_t)value > settings.shared_optin;
  return too_much ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
DONE(cuFuncSetCacheConfig, (CUfunction function, CUfunc_cache config))
API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, CUfunction function, int block, size_t shared) {
  return (CUresult)cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(count, function, block, shared, 0);
}
API CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  return *count = 1, CUDA_SUCCESS;
}
API CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                            unsigned bz, unsigned shared, CUstream stream, void **arguments, void **extra) {
  return (CUresult)launch(function);
}
API CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  return (CUresult)launch(function);
}
API CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                       unsigned by, unsigned bz, unsigned shared, CUstream stream, void **arguments) {
  return (CUresult)launch(function);
}

/* A tensor map describes tiles to hardware that isn't there. */
API CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                    const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                    const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                    CUtensorMapFloatOOBfill fill) {
  return memset(map, 0, sizeof *map), CUDA_SUCCESS;
}
