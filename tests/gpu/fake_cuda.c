/*
 * A libcuda.so.1 without a GPU: device memory is the host's, calls are logged, a launch is handed to the test.
 *
 * Prototypes as in cuda.h, so that arguments of the wrong size show. Asynchronous work is done at once. A clock that
 * only work moves gives events their times: 1 us for everything, 40 us for a launch of "sweep".
 */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef void (*Hook)(const char *entry, unsigned blocks, unsigned threads, unsigned shared, void **arguments);

/* Copies of LARGE bytes and more, which only a timing wants, are not done. */
enum { LOG = 1 << 20, LARGE = 64 << 20 };

static char log_text[LOG], fail_name[64];
static int fail_code, allocated, modules, events;
static double now;
static Hook hook;

static int note(const char *name, const char *format, ...) {
    size_t used = strlen(log_text);
    if (used < LOG - 512) {
        va_list arguments;
        va_start(arguments, format);
        used += (size_t)sprintf(log_text + used, "%s ", name);
        used += (size_t)vsnprintf(log_text + used, 256, format, arguments);
        strcpy(log_text + used, "\n");
        va_end(arguments);
    }
    now += 1e-3;
    return strcmp(name, fail_name) ? 0 : fail_code;
}

#define NOTE(...)                                \
    do {                                         \
        int code = note(__func__, __VA_ARGS__);  \
        if (code) return code;                   \
    } while (0)

static void *pointer(uint64_t address) { return (void *)(uintptr_t)address; }

/* For tests. */

void fake_reset(void) {
    log_text[0] = fail_name[0] = 0;
    allocated = modules = events = 0;
    now = 0;
    hook = NULL;
}

void fake_hook(Hook function) { hook = function; }

void fake_fail(const char *name, int code) {
    strcpy(fail_name, name);
    fail_code = code;
}

const char *fake_log(void) { return log_text; }

int fake_allocated(void) { return allocated; }

int fake_modules(void) { return modules; }

int fake_events(void) { return events; }

/* The driver. */

int cuInit(unsigned flags) {
    NOTE("%u", flags);
    return 0;
}

int cuDriverGetVersion(int *version) {
    *version = 13020;
    return 0;
}

int cuGetErrorName(int code, const char **text) {
    *text = code == 2     ? "CUDA_ERROR_OUT_OF_MEMORY"
            : code == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
            : code == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS"
                          : NULL;
    return *text ? 0 : 1;
}

int cuGetErrorString(int code, const char **text) {
    *text = code == 2 ? "out of memory" : "some other error";
    return 0;
}

int cuDeviceGetCount(int *count) {
    *count = 1;
    return 0;
}

int cuDeviceGet(int *device, int number) {
    *device = number;
    return number ? 101 : 0;
}

int cuDeviceGetName(char *name, int size, int device) {
    (void)device;
    snprintf(name, (size_t)size, "Fake GPU");
    return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    switch (attribute) {
        case 16: *value = 10; return 0;       /* MULTIPROCESSOR_COUNT */
        case 38: *value = 1 << 20; return 0;  /* L2_CACHE_SIZE */
        case 75: *value = 9; return 0;        /* COMPUTE_CAPABILITY_MAJOR */
        case 76: *value = 0; return 0;        /* COMPUTE_CAPABILITY_MINOR */
        case 97: *value = 232448; return 0;   /* MAX_SHARED_MEMORY_PER_BLOCK_OPTIN */
        default: return 1;
    }
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = (void *)0xC0;
    NOTE("%d", device);
    return 0;
}

int cuCtxSetCurrent(void *context) {
    NOTE("%p", context);
    return 0;
}

int cuStreamCreate(void **stream, unsigned flags) {
    *stream = (void *)0x57;
    NOTE("%u", flags);
    return 0;
}

int cuStreamSynchronize(void *stream) {
    NOTE("%p", stream);
    return 0;
}

int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    NOTE("%zu", bytes);
    *address = (uint64_t)(uintptr_t)aligned_alloc(256, (bytes + 255) / 256 * 256);
    ++allocated;
    return 0;
}

int cuMemFree_v2(uint64_t address) {
    free(pointer(address));
    --allocated;
    return 0;
}

int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
    NOTE("%zu %p", bytes, stream);
    memcpy(pointer(to), from, bytes);
    return 0;
}

int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
    NOTE("%zu %p", bytes, stream);
    memcpy(to, pointer(from), bytes);
    return 0;
}

int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *stream) {
    NOTE("%zu %p", bytes, stream);
    if (bytes < LARGE) memcpy(pointer(to), pointer(from), bytes);
    return 0;
}

int cuMemsetD8Async(uint64_t to, unsigned char byte, size_t bytes, void *stream) {
    NOTE("%u %zu %p", byte, bytes, stream);
    if (bytes < LARGE) memset(pointer(to), byte, bytes);
    return 0;
}

int cuEventCreate(void **event, unsigned flags) {
    NOTE("%u", flags);
    *event = calloc(1, sizeof(double));
    ++events;
    return 0;
}

int cuEventDestroy_v2(void *event) {
    free(event);
    --events;
    return 0;
}

int cuEventRecord(void *event, void *stream) {
    NOTE("%p", stream);
    *(double *)event = now;
    return 0;
}

int cuEventElapsedTime(float *milliseconds, void *start, void *end) {
    *milliseconds = (float)(*(double *)end - *(double *)start);
    return 0;
}

int cuModuleLoadData(void **module, const void *image) {
    NOTE("%.4s", (const char *)image + 1);
    *module = malloc(1);
    ++modules;
    return 0;
}

int cuModuleUnload(void *module) {
    free(module);
    --modules;
    return 0;
}

/* A function is its name; the few bytes are never given back. */
int cuModuleGetFunction(void **function, void *module, const char *name) {
    (void)module;
    NOTE("%s", name);
    *function = strdup(name);
    return 0;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    NOTE("%s %d %d", (char *)function, attribute, value);
    return 0;
}

int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared, void *stream, void **arguments, void **extra) {
    NOTE("%s %u,%u,%u %u,%u,%u %u %p %p", (char *)function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared,
         stream, (void *)extra);
    if (!strcmp(function, "sweep"))
        now += 39e-3;
    else if (hook)
        hook(function, grid_x, block_x, shared, arguments);
    return 0;
}
