/*
 * A libcuda.so.1 without a GPU. Device memory is host memory, every call is printed, and wrong use is an error: a call
 * without the context of its device, a handle that is not there any more.
 *
 * FAKE_CUDA_ARCH   compute capability of each device, such as "80" or "80,90"; default one device "90"
 * FAKE_CUDA_FAIL   "cuMemAlloc_v2 2": calls of this function fail with this error
 * FAKE_CUDA_FAIL_AT  "3": the third call fails, of whatever function
 *
 * An image is text: a line "name arguments [K N R C panel]" for each function. A function with the five sizes is run:
 * y = relu(x W + bias) + residual, of float32, with the arguments in the order of `CUDA_ARGUMENTS`.
 */
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { INVALID_VALUE = 1, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, NOT_FOUND = 500, UNKNOWN = 999 };
enum { DEVICES = 4, FUNCTIONS = 8, MOST_SHARED = 100 << 10, MULTIPROCESSORS = 4 };

typedef struct Module Module;

typedef struct {
    Module *module;
    char name[64];
    int arguments;
    int64_t k, n, block_rows, block_cols, panel;
    int shared;
} Function;

struct Module {
    int device;
    Function functions[FUNCTIONS];
};

static struct {
    int users;
} contexts[DEVICES];

static _Thread_local void *stack[8];
static _Thread_local int depth;

static _Thread_local const char *called;

/* Prints the call in one piece, whatever other threads print. */
static void say(const char *format, ...) {
    char line[1024];
    int used = snprintf(line, sizeof line, "%s", called);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line + used, sizeof line - (size_t)used, format, arguments);
    va_end(arguments);
    puts(line);
}

/* Whether a call is to fail. */
static int call(const char *name) {
    static _Atomic int calls;
    const char *fail = getenv("FAKE_CUDA_FAIL"), *at = getenv("FAKE_CUDA_FAIL_AT");
    char wanted[64] = "";
    int error = UNKNOWN;
    called = name;
    if ((fail && sscanf(fail, "%63s %d", wanted, &error) && !strcmp(wanted, name)) || (at && atoi(at) == ++calls)) {
        say(" fails");
        return error;
    }
    return 0;
}

/* What gives something back does so even where it fails, as the end of the process would. */
#define CALL(name) \
    do { \
        int error_ = call(#name); \
        if (error_) \
            return error_; \
    } while (0)

static int current_device(void) {
    for (int i = 0; depth && i < DEVICES; i++)
        if (stack[depth - 1] == &contexts[i] && contexts[i].users)
            return i;
    return -1;
}

static int arch(int device) {
    const char *text = getenv("FAKE_CUDA_ARCH");
    for (text = text ? text : "90"; device; device--) {
        text = strchr(text, ',');
        if (!text)
            return 0;
        text++;
    }
    return atoi(text);
}

int cuInit(unsigned flags) {
    CALL(cuInit);
    say("");
    return flags ? INVALID_VALUE : 0;
}

int cuDriverGetVersion(int *version) {
    *version = 12040;
    return 0;
}

int cuGetErrorName(int error, const char **name) {
    static const struct {
        int error;
        const char *name;
    } names[] = {{1, "CUDA_ERROR_INVALID_VALUE"},           {2, "CUDA_ERROR_OUT_OF_MEMORY"},
                 {100, "CUDA_ERROR_NO_DEVICE"},             {200, "CUDA_ERROR_INVALID_IMAGE"},
                 {201, "CUDA_ERROR_INVALID_CONTEXT"},       {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"},
                 {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"}, {500, "CUDA_ERROR_NOT_FOUND"},
                 {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (names[i].error == error) {
            *name = names[i].name;
            return 0;
        }
    return INVALID_VALUE;
}

int cuDeviceGet(int *device, int ordinal) {
    CALL(cuDeviceGet);
    say("");
    *device = ordinal;
    return ordinal < DEVICES && arch(ordinal) ? 0 : INVALID_VALUE;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    CALL(cuDeviceGetAttribute);
    say("");
    switch (attribute) {
    case 16:
        *value = MULTIPROCESSORS;
        return 0;
    case 75:
        *value = arch(device) / 10;
        return 0;
    case 76:
        *value = arch(device) % 10;
        return 0;
    case 97:
        *value = MOST_SHARED;
        return 0;
    default:
        return INVALID_VALUE;
    }
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    CALL(cuDevicePrimaryCtxRetain);
    say(" %d", device);
    contexts[device].users++;
    *context = &contexts[device];
    return 0;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    bool held = contexts[device].users-- > 0;
    CALL(cuDevicePrimaryCtxRelease_v2);
    say(" %d", device);
    return held ? 0 : INVALID_CONTEXT;
}

int cuCtxPushCurrent_v2(void *context) {
    CALL(cuCtxPushCurrent_v2);
    stack[depth++] = context;
    say(" %d", current_device());
    return current_device() < 0 ? INVALID_CONTEXT : 0;
}

int cuCtxPopCurrent_v2(void **context) {
    int device = current_device();
    if (!depth)
        return INVALID_CONTEXT;
    *context = stack[--depth];
    CALL(cuCtxPopCurrent_v2);
    say(" %d", device);
    return 0;
}

int cuModuleLoadData(Module **module, const void *image) {
    CALL(cuModuleLoadData);
    say(" on %d at %d", current_device(), (int)((uintptr_t)image % 16));
    if (current_device() < 0)
        return INVALID_CONTEXT;
    *module = calloc(1, sizeof **module);
    (*module)->device = current_device();
    const char *line = image;
    for (int i = 0; *line; i++) {
        Function *f = &(*module)->functions[i];
        f->module = *module;
        if (sscanf(line, "%63s %d %ld %ld %ld %ld %ld", f->name, &f->arguments, &f->k, &f->n, &f->block_rows,
                   &f->block_cols, &f->panel) < 2) {
            free(*module);
            return INVALID_IMAGE;
        }
        line = strchr(line, '\n') + 1;
    }
    return 0;
}

int cuModuleUnload(Module *module) {
    int device = module->device;
    free(module);
    CALL(cuModuleUnload);
    say(" on %d", device);
    return current_device() == device ? 0 : INVALID_CONTEXT;
}

int cuModuleGetFunction(Function **function, Module *module, const char *name) {
    CALL(cuModuleGetFunction);
    say(" %s", name);
    for (int i = 0; i < FUNCTIONS; i++)
        if (!strcmp(module->functions[i].name, name)) {
            *function = &module->functions[i];
            return 0;
        }
    return NOT_FOUND;
}

int cuFuncSetAttribute(Function *function, int attribute, int value) {
    CALL(cuFuncSetAttribute);
    say(" %s %d %d", function->name, attribute, value);
    function->shared = value;
    return attribute == 8 && value <= MOST_SHARED ? 0 : INVALID_VALUE;
}

int cuMemAlloc_v2(uint64_t *memory, size_t bytes) {
    CALL(cuMemAlloc_v2);
    *memory = (uintptr_t)aligned_alloc(256, (bytes + 255) / 256 * 256);
    say(" %#lx", *memory);
    return current_device() < 0 ? INVALID_CONTEXT : 0;
}

int cuMemFree_v2(uint64_t memory) {
    free((void *)memory);
    CALL(cuMemFree_v2);
    say(" %#lx", memory);
    return current_device() < 0 ? INVALID_CONTEXT : 0;
}

int cuMemcpyHtoD_v2(uint64_t target, const void *source, size_t bytes) {
    CALL(cuMemcpyHtoD_v2);
    char words[768] = "";
    const int32_t *word = source;
    for (size_t i = 0, used = 0; i < bytes / sizeof *word && used + 32 < sizeof words; i++)
        if (word[i])
            used += (size_t)snprintf(words + used, sizeof words - used, " %zu:%d", i, word[i]);
    say("%s", words);
    memcpy((void *)target, source, bytes);
    return current_device() < 0 ? INVALID_CONTEXT : 0;
}

int cuMemsetD16Async(uint64_t target, unsigned short value, size_t count, void *stream) {
    CALL(cuMemsetD16Async);
    say(" %#lx %#hx %zu %p", target, value, count, stream);
    return current_device() < 0 ? INVALID_CONTEXT : 0;
}

int cuMemsetD32Async(uint64_t target, unsigned value, size_t count, void *stream) {
    CALL(cuMemsetD32Async);
    say(" %#lx %#x %zu %p", target, value, count, stream);
    /* The double of ONNX Runtime's stream is not null and stands for memory that is not there either. */
    for (size_t i = 0; !stream && i < count; i++)
        ((uint32_t *)target)[i] = value;
    return current_device() < 0 ? INVALID_CONTEXT : 0;
}

int cuStreamSynchronize(void *stream) {
    CALL(cuStreamSynchronize);
    say(" %p", stream);
    return current_device() < 0 ? INVALID_CONTEXT : 0;
}

static void run(const Function *f, void **parameters) {
    const float *x = *(float **)parameters[0], *values = *(float **)parameters[1];
    const int32_t *indices = *(int32_t **)parameters[2], *indptr = *(int32_t **)parameters[3];
    const int32_t *order = *(int32_t **)parameters[4];
    const float *bias = *(float **)parameters[5], *residual = *(float **)parameters[6];
    float *y = *(float **)parameters[7];
    int64_t rows = *(int64_t *)parameters[9], panels = (f->block_rows + f->panel - 1) / f->panel;
    int64_t padded = (f->n + f->block_rows - 1) / f->block_rows * f->block_rows;
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < padded; i++) {
            int64_t place = i / f->block_rows, p = i % f->block_rows / f->panel, v = i % f->block_rows % f->panel;
            int64_t block_row = order[place], out = block_row * f->block_rows + i % f->block_rows;
            int64_t begin = indptr[block_row], count = indptr[block_row + 1] - begin;
            if (out >= f->n)
                continue;
            const float *stream = values + (begin * panels + p * count) * f->block_cols * f->panel + v;
            float sum = bias ? bias[out] : 0;
            for (int64_t t = 0; t < count * f->block_cols; t++)
                sum += x[row * f->k + indices[begin + t / f->block_cols] + t % f->block_cols] * stream[t * f->panel];
            y[row * f->n + out] = (sum > 0 ? sum : 0) + (residual ? residual[row * f->n + out] : 0);
        }
}

int cuLaunchKernel(Function *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    CALL(cuLaunchKernel);
    char arguments[512] = "";
    for (int i = 0, used = 0; i < function->arguments; i++)
        used += snprintf(arguments + used, sizeof arguments - (size_t)used, " %#lx", *(uint64_t *)parameters[i]);
    say(" %s on %d grid %u %u %u block %u %u %u shared %u stream %p args%s", function->name, current_device(), gx, gy,
        gz, bx, by, bz, shared, stream, arguments);
    if (shared > 48 << 10 && shared > (unsigned)function->shared)
        return INVALID_VALUE;
    if (current_device() != function->module->device || extra)
        return INVALID_CONTEXT;
    if (function->panel)
        run(function, parameters);
    return 0;
}
