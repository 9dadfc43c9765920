/* NVML. nvml.h is not in the wheels: these are its layouts. Handles are pointers to the (physical) devices. What isn't
 * here is missing altogether, and pynvml says so ("Function Not Found"). */
#include <unistd.h>

#include "gpu.h"

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory2;
typedef struct { unsigned pid; unsigned long long used; } Process1;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } Process;
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } Pci;
enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, UNSUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7 };
#define OTHER_PID 1 /* whoever holds AUTOACCUM_GPU_OTHER */

/* The library ----------------------------------------------------------- */

API int nvmlInit_v2(void) { return OK; }
API int nvmlInit(void) { return OK; }
API int nvmlInitWithFlags(unsigned flags) { return OK; }
API int nvmlShutdown(void) { return OK; }
API const char *nvmlErrorString(int error) {
  switch (error) {
    case OK: return "Success";
    case INVALID: return "Invalid Argument";
    case UNSUPPORTED: return "Not Supported";
    case NOT_FOUND: return "Not Found";
    case TOO_SMALL: return "Insufficient Size";
    default: return "Unknown Error";
  }
}
API int nvmlSystemGetDriverVersion(char *text, unsigned length) { return snprintf(text, length, "580.00"), OK; }
API int nvmlSystemGetNVMLVersion(char *text, unsigned length) { return snprintf(text, length, "13.580.00"), OK; }
API int nvmlSystemGetCudaDriverVersion(int *version) { return *version = CUDART_VERSION, OK; }
API int nvmlSystemGetCudaDriverVersion_v2(int *version) { return *version = CUDART_VERSION, OK; }

/* Devices --------------------------------------------------------------- */

API int nvmlDeviceGetCount_v2(unsigned *count) { return *count = settings.physical, OK; }
API int nvmlDeviceGetHandleByIndex_v2(unsigned physical, Device **device) {
  if (physical >= (unsigned)settings.physical) return INVALID;
  return *device = &devices[physical], OK;
}
API int nvmlDeviceGetHandleByPciBusId_v2(const char *id, Device **device) {
  unsigned domain, bus;
  if (sscanf(id, "%x:%x", &domain, &bus) != 2 || bus < 1 || bus > (unsigned)settings.physical) return NOT_FOUND;
  return *device = &devices[bus - 1], OK;
}
API int nvmlDeviceGetIndex(Device *device, unsigned *physical) { return *physical = device - devices, OK; }
API int nvmlDeviceGetMinorNumber(Device *device, unsigned *physical) { return *physical = device - devices, OK; }
API int nvmlDeviceGetName(Device *device, char *text, unsigned length) {
  return snprintf(text, length, "%s", settings.name), OK;
}
API int nvmlDeviceGetUUID(Device *device, char *text, unsigned length) {
  char uuid[48];
  uuid_text(device - devices, uuid);
  return snprintf(text, length, "%s", uuid), OK;
}
API int nvmlDeviceGetHandleByUUID(const char *uuid, Device **device) {
  char text[48];
  for (int i = 0; i < settings.physical; i++) {
    uuid_text(i, text);
    if (!strcmp(text, uuid)) return *device = &devices[i], OK;
  }
  return NOT_FOUND;
}
API int nvmlDeviceGetPciInfo_v3(Device *device, Pci *pci) {
  *pci = (Pci){.bus = device - devices + 1};
  snprintf(pci->legacy, sizeof pci->legacy, "0000:%02X:00.0", pci->bus);
  snprintf(pci->bus_id, sizeof pci->bus_id, "00000000:%02X:00.0", pci->bus);
  return OK;
}
API int nvmlDeviceGetCudaComputeCapability(Device *device, int *major, int *minor) {
  return *major = settings.cc_major, *minor = settings.cc_minor, OK;
}
API int nvmlDeviceGetUtilizationRates(Device *device, unsigned rates[2]) { return rates[0] = rates[1] = 0, OK; }
API int nvmlDeviceGetMigMode(Device *device, unsigned *now, unsigned *pending) { return UNSUPPORTED; }

/* Memory and who has it: this process (with its context), then the other one if it holds anything --- */

API int nvmlDeviceGetMemoryInfo(Device *device, Memory *memory) {
  pthread_mutex_lock(&lock);
  size_t free = free_bytes(device);
  pthread_mutex_unlock(&lock);
  return *memory = (Memory){settings.memory, free, settings.memory - free}, OK;
}
API int nvmlDeviceGetMemoryInfo_v2(Device *device, Memory2 *memory) {
  Memory first;
  nvmlDeviceGetMemoryInfo(device, &first);
  memory->total = first.total, memory->reserved = 0, memory->free = first.free, memory->used = first.used;
  return OK;
}
static unsigned processes(Device *device, Process found[2]) {
  unsigned count = 0;
  pthread_mutex_lock(&lock);
  if (device->active) found[count++] = (Process){getpid(), context_bytes(device) + device->used, -1, -1};
  if (device->other) found[count++] = (Process){OTHER_PID, device->other, -1, -1};
  pthread_mutex_unlock(&lock);
  return count;
}
API int nvmlDeviceGetComputeRunningProcesses_v3(Device *device, unsigned *count, Process *list) {
  Process found[2];
  unsigned room = *count;
  *count = processes(device, found);
  if (room < *count) return TOO_SMALL;
  return memcpy(list, found, *count * sizeof *found), OK;
}
API int nvmlDeviceGetComputeRunningProcesses_v2(Device *device, unsigned *count, Process *list) {
  return nvmlDeviceGetComputeRunningProcesses_v3(device, count, list);
}
/* The first version's entries are shorter; PyTorch reads this process's bytes from it for its out-of-memory text. */
API int nvmlDeviceGetComputeRunningProcesses(Device *device, unsigned *count, Process1 *list) {
  Process found[2];
  unsigned room = *count;
  *count = processes(device, found);
  if (room < *count) return TOO_SMALL;
  for (unsigned i = 0; i < *count; i++) list[i] = (Process1){found[i].pid, found[i].used};
  return OK;
}
API int nvmlDeviceGetGraphicsRunningProcesses_v3(Device *device, unsigned *count, Process *list) {
  return *count = 0, OK;
}

/* PyTorch insists that these exist. */
API int nvmlDeviceGetNvLinkRemoteDeviceType(void) { return UNSUPPORTED; }
API int nvmlDeviceGetNvLinkRemotePciInfo_v2(void) { return UNSUPPORTED; }
API int nvmlDeviceGetGpuFabricInfoV(void) { return UNSUPPORTED; }
