/* What the environment asks for. The launcher (gpu.py) checks and converts it; what is set by hand and can't be read
 * ends the process with a sentence, since a GPU of another size than the one asked for would be silently wrong. */
#include <errno.h>

#include "gpu.h"

Settings settings;

static void refuse(const char *name, const char *text, const char *expected) {
  fprintf(stderr, "virtual GPU: %s=%s is not %s.\n", name, text, expected);
  _Exit(2);
}

static const char *text_of(const char *name) {
  const char *text = getenv(name);
  return text && *text ? text : NULL;
}

static size_t number_of(const char *name, size_t otherwise, size_t most) {
  const char *text = text_of(name);
  char *end;
  if (!text) return otherwise;
  errno = 0;
  unsigned long long number = strtoull(text, &end, 10);
  if (errno || end == text || *end || *text == '-' || number > most) refuse(name, text, "a number in its range");
  return number;
}

/* A device's UUID is a hash of its number (the finalizer of splitmix64, by Sebastiano Vigna), so that they differ from
 * the first digits on, as real ones do, and are the same in every run. */
void uuid_of(int physical, unsigned char bytes[16]) {
  for (int half = 0; half < 2; half++) {
    uint64_t word = (2 * physical + half + 1) * 0x9e3779b97f4a7c15ull;
    word = (word ^ word >> 30) * 0xbf58476d1ce4e5b9ull;
    word = (word ^ word >> 27) * 0x94d049bb133111ebull;
    word ^= word >> 31;
    memcpy(bytes + 8 * half, &word, 8);
  }
}

void uuid_text(int physical, char text[48]) {
  unsigned char bytes[16];
  uuid_of(physical, bytes);
  text += sprintf(text, "GPU");
  for (int i = 0; i < 16; i++) {
    int begins = i == 0 || (i >= 4 && i <= 10 && i % 2 == 0);
    text += sprintf(text, begins ? "-%02x" : "%02x", bytes[i]);
  }
}

/* CUDA_VISIBLE_DEVICES, as the CUDA programming guide has it: indices, or UUIDs of which a unique beginning suffices;
 * the list ends at the first entry that names no device; naming a device twice leaves none. */
static int physical_of(const char *entry, size_t length) {
  char text[48], *end;
  int found = -1;
  if (!strncmp(entry, "GPU-", 4)) {
    for (int i = 0; i < settings.physical; i++) {
      uuid_text(i, text);
      if (length > strlen(text) || strncasecmp(text, entry, length)) continue;
      if (found >= 0) return -1;
      found = i;
    }
    return found;
  }
  long number = strtol(entry, &end, 10);
  return end == entry + length && length && number >= 0 && number < settings.physical ? (int)number : -1;
}

static void read_visible(const char *list) {
  int seen[MAX_DEVICES] = {0};
  if (!list)
    for (int i = 0; i < settings.physical; i++) settings.visible[settings.logical++] = i;
  while (list && *list) {
    while (*list == ' ') list++;
    size_t length = strcspn(list, ", ");
    int physical = physical_of(list, length);
    if (physical < 0) return;
    if (seen[physical]++) {
      settings.logical = 0;
      return;
    }
    settings.visible[settings.logical++] = physical;
    list += length;
    list += strspn(list, " ");
    list += *list == ',';
  }
}

static void read_capability(void) {
  const char *name = "AUTOACCUM_GPU_COMPUTE_CAPABILITY", *text = text_of(name);
  char rest;
  if (!text) text = "8.0";
  if (sscanf(text, "%d.%d%c", &settings.cc_major, &settings.cc_minor, &rest) != 2) refuse(name, text, "like 8.0");
  /* CUDA programming guide, technical specifications per compute capability: 227 KiB from 9.0, 163 at 8.0 and 8.7,
   * 99 at 8.6, 8.9 and 12.x, 64 at 7.5 (96 at 7.0) */
  int cc = 10 * settings.cc_major + settings.cc_minor;
  int kib = cc >= 120 ? 99 : cc >= 90 ? 227 : cc == 80 || cc == 87 ? 163 : cc > 80 ? 99 : cc == 75 ? 64 : 96;
  settings.shared_optin = 1024 * kib;
}

static void read_workspace(void) {
  const char *name = "AUTOACCUM_GPU_CONVOLUTION_WORKSPACE", *text = text_of(name);
  char *end;
  settings.workspace_transposed = text && !strcmp(text, "transposed");
  if (settings.workspace_transposed) return;
  if (!text || text[strlen(text) - 1] != 'x') {
    settings.workspace = number_of(name, 0, SIZE_MAX);
    return;
  }
  settings.workspace_factor = strtod(text, &end);
  if (end == text || end[0] != 'x' || end[1]) refuse(name, text, "a number of bytes, like 0.5x, or transposed");
}

/* Also called for a forked process with an environment of its own, before it uses its GPU (control.py). */
API __attribute__((constructor)) void autoaccum_gpu_read_settings(void) {
  const char *text;
  settings = (Settings){0};
  settings.physical = number_of("AUTOACCUM_GPU_DEVICES", 1, MAX_DEVICES);
  settings.memory = number_of("AUTOACCUM_GPU_MEMORY", 16ull << 30, 1ull << 44);
  settings.context = number_of("AUTOACCUM_GPU_CONTEXT", 512ull << 20, 1ull << 44);
  settings.other = number_of("AUTOACCUM_GPU_OTHER", 0, 1ull << 44);
  settings.multiprocessors = number_of("AUTOACCUM_GPU_MULTIPROCESSORS", 108, 1 << 16);
  settings.fallback = number_of("AUTOACCUM_GPU_CONVOLUTION_FALLBACK", 1, 1);
  settings.trial = number_of("AUTOACCUM_GPU_TRIAL_WORKSPACE", 0, 1ull << 44);
  settings.kernel = number_of("AUTOACCUM_GPU_KERNEL", 0, 1ull << 44);
  settings.lag = number_of("AUTOACCUM_GPU_LAG", 0, 1ull << 32);
  settings.name = text_of("AUTOACCUM_GPU_NAME") ? text_of("AUTOACCUM_GPU_NAME") : "Virtual GPU";
  read_capability();
  read_workspace();
  text = text_of("AUTOACCUM_GPU_COPIES");
  settings.copies = !text || !strcmp(text, "tensors") ? COPY_TENSORS : !strcmp(text, "all") ? COPY_ALL : COPY_ZERO;
  if (settings.copies == COPY_ZERO && strcmp(text, "zero"))
    refuse("AUTOACCUM_GPU_COPIES", text, "tensors, all or zero");
  text = text_of("AUTOACCUM_GPU_ADDRESSES");
  settings.downward = text && !strcmp(text, "down");
  if (text && !settings.downward && strcmp(text, "up")) refuse("AUTOACCUM_GPU_ADDRESSES", text, "up or down");
  read_visible(getenv("CUDA_VISIBLE_DEVICES"));
  for (int i = 0; i < settings.physical; i++) devices[i].other = settings.other;
}
