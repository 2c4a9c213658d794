/* Finding the driver, saying what it complains of, and loading code. */
#include "cuda_driver.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

/*
 * glibc 2.34 moved dlopen, dlsym and dlerror from libdl.so.2 to libc.so.6 under a new version, and kept the old ones.
 * Asking for the old ones (and, in library.py, for libdl.so.2) lets a library linked there run with older releases.
 */
#if defined(__GLIBC__) && defined(__x86_64__)
#define OLDEST "GLIBC_2.2.5"
#elif defined(__GLIBC__) && defined(__aarch64__)
#define OLDEST "GLIBC_2.17"
#endif
#ifdef OLDEST
__asm__(".symver dlopen, dlopen@" OLDEST);
__asm__(".symver dlsym, dlsym@" OLDEST);
__asm__(".symver dlerror, dlerror@" OLDEST);
#endif

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* ---- The driver ---- */

static OrtStatus *find_functions(const Node *node, void *library, Driver *driver) {
#define FIND(name, parameters) \
    driver->name = (CUresult(*) parameters)dlsym(library, #name); \
    if (!driver->name) \
        return node_error(node, ORT_NOT_IMPLEMENTED, "the NVIDIA driver has no " #name ": update it");
    DRIVER_FUNCTIONS(FIND)
#undef FIND
    return NULL;
}

/* The library is never closed: the driver has threads of its own. */
static OrtStatus *load_driver(const Node *node, Driver *driver) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library)
        return node_error(node, ORT_FAIL,
                          "this session uses the CUDA provider, but the NVIDIA driver cannot be loaded (%s): install "
                          "it, or start the container with its GPUs",
                          dlerror());
    TRY(find_functions(node, library, driver));
    TRY_CUDA(node, driver, cuInit, 0);
    return NULL;
}

OrtStatus *driver_open(const Node *node, const Driver **result) {
    static Driver driver;
    static bool loaded;
    pthread_mutex_lock(&lock);
    OrtStatus *status = loaded ? NULL : load_driver(node, &driver);
    loaded = !status;
    pthread_mutex_unlock(&lock);
    *result = &driver;
    return status;
}

/* ---- Errors ---- */

static OrtStatus *driver_too_old(const Node *node, const Driver *driver, const char *name, const char *what) {
    int version = 0;
    driver->cuDriverGetVersion(&version);
    return node_error(node, ORT_FAIL, "%s failed with %s; update the NVIDIA driver, which is made for CUDA %d.%d", what,
                      name, version / 1000, version % 1000 / 10);
}

OrtStatus *driver_error(const Node *node, const Driver *driver, CUresult error, const char *what) {
    const char *name;
    if (driver->cuGetErrorName(error, &name))
        name = "an unknown error";
    switch (error) {
    case CUDA_ERROR_OUT_OF_MEMORY:
        return node_error(node, ORT_FAIL, "%s failed with %s; free memory of the GPU or open fewer sessions on it",
                          what, name);
    case CUDA_ERROR_INVALID_IMAGE:
    case CUDA_ERROR_NO_BINARY_FOR_GPU:
    case CUDA_ERROR_INVALID_PTX:
    case CUDA_ERROR_JIT_COMPILER_NOT_FOUND:
    case CUDA_ERROR_UNSUPPORTED_PTX_VERSION:
        return driver_too_old(node, driver, name, what);
    default:
        return node_error(node, ORT_FAIL,
                          "%s failed with %s; if nvidia-smi shows the GPU to be well, an operator that ran before may "
                          "have failed, which CUDA_LAUNCH_BLOCKING=1 shows",
                          what, name);
    }
}

/* ---- Modules ---- */

static Module *modules;

static Module *find_module(CUdevice device, const void *image) {
    Module *module = modules;
    while (module && (module->device != device || module->image != image))
        module = module->next;
    return module;
}

static OrtStatus *load_module(const Node *node, const Driver *driver, CUdevice device, const CudaVariant *variant,
                              Module **result) {
    Module *module = malloc(sizeof *module);
    if (!module)
        return node_error(node, ORT_FAIL, "out of memory");
    *module = (Module){.device = device, .image = variant->image, .next = modules};
    CUresult error = driver->cuModuleLoadData(&module->handle, variant->image);
    if (error) {
        char what[64];
        snprintf(what, sizeof what, "loading the code for %s", variant->arch);
        free(module);
        return driver_error(node, driver, error, what);
    }
    modules = module;
    *result = module;
    return NULL;
}

OrtStatus *module_acquire(const Node *node, const Driver *driver, CUdevice device, const CudaVariant *variant,
                          Module **result) {
    OrtStatus *status = NULL;
    pthread_mutex_lock(&lock);
    Module *module = find_module(device, variant->image);
    if (!module)
        status = load_module(node, driver, device, variant, &module);
    if (!status) {
        module->users++;
        *result = module;
    }
    pthread_mutex_unlock(&lock);
    return status;
}

void module_release(const Driver *driver, Module *module) {
    pthread_mutex_lock(&lock);
    if (--module->users == 0) {
        Module **link = &modules;
        while (*link != module)
            link = &(*link)->next;
        *link = module->next;
        driver->cuModuleUnload(module->handle);
        free(module);
    }
    pthread_mutex_unlock(&lock);
}
