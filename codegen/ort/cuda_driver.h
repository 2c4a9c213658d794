/*
 * The part of NVIDIA's driver API that the operator uses, in our own words, and the modules that it has loaded.
 *
 * The driver is looked for when the first node of the CUDA provider is created, not when the library is loaded: where
 * there is none, the CPU provider's nodes work. The names are the driver's, whose documentation therefore applies.
 */
#ifndef SPARSEC_CUDA_DRIVER_H
#define SPARSEC_CUDA_DRIVER_H

#include "sparse_linear.h"

typedef enum {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_INVALID_IMAGE = 200,
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
    CUDA_ERROR_INVALID_PTX = 218,
    CUDA_ERROR_JIT_COMPILER_NOT_FOUND = 221,
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222
} CUresult;

typedef enum {
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97
} CUdevice_attribute;

typedef enum { CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 } CUfunction_attribute;

typedef int CUdevice;
typedef uint64_t CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;

/* Each function under the name that it has in libcuda.so.1: `cuda.h` renames those that end in _v2. */
#define DRIVER_FUNCTIONS(F) \
    F(cuInit, (unsigned flags)) \
    F(cuDriverGetVersion, (int *version)) \
    F(cuGetErrorName, (CUresult error, const char **name)) \
    F(cuDeviceGet, (CUdevice *device, int ordinal)) \
    F(cuDeviceGetAttribute, (int *value, CUdevice_attribute attribute, CUdevice device)) \
    F(cuDevicePrimaryCtxRetain, (CUcontext *context, CUdevice device)) \
    F(cuDevicePrimaryCtxRelease_v2, (CUdevice device)) \
    F(cuCtxPushCurrent_v2, (CUcontext context)) \
    F(cuCtxPopCurrent_v2, (CUcontext *context)) \
    F(cuModuleLoadData, (CUmodule *module, const void *image)) \
    F(cuModuleUnload, (CUmodule module)) \
    F(cuModuleGetFunction, (CUfunction *function, CUmodule module, const char *name)) \
    F(cuFuncSetAttribute, (CUfunction function, CUfunction_attribute attribute, int value)) \
    F(cuMemAlloc_v2, (CUdeviceptr *memory, size_t bytes)) \
    F(cuMemFree_v2, (CUdeviceptr memory)) \
    F(cuMemcpyHtoD_v2, (CUdeviceptr target, const void *source, size_t bytes)) \
    F(cuMemsetD16Async, (CUdeviceptr target, unsigned short value, size_t count, CUstream stream)) \
    F(cuMemsetD32Async, (CUdeviceptr target, unsigned value, size_t count, CUstream stream)) \
    F(cuStreamSynchronize, (CUstream stream)) \
    F(cuLaunchKernel, (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, \
                       unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream stream, void **parameters, \
                       void **extra))

typedef struct {
#define MEMBER(name, parameters) CUresult(*name) parameters;
    DRIVER_FUNCTIONS(MEMBER)
#undef MEMBER
} Driver;

/* The driver, initialised; found once a process. */
HIDDEN OrtStatus *driver_open(const Node *node, const Driver **driver);

/* "<what> failed with <the driver's name for `error`>; <what to do>". */
HIDDEN OrtStatus *driver_error(const Node *node, const Driver *driver, CUresult error, const char *what);

/* Leaves the calling function with a status unless the driver's function succeeds. */
#define TRY_CUDA(node, driver, function, ...) \
    do { \
        CUresult result_ = (driver)->function(__VA_ARGS__); \
        if (result_) \
            return driver_error((node), (driver), result_, #function); \
    } while (0)

/* An image loaded into the primary context of a device. */
typedef struct Module {
    CUmodule handle;
    CUdevice device;
    const void *image;
    int64_t users;
    struct Module *next;
} Module;

/*
 * The module of `image` in `device`, whose primary context is current: loaded when the first user asks, unloaded when
 * the last gives it back.
 */
HIDDEN OrtStatus *module_acquire(const Node *node, const Driver *driver, CUdevice device, const CudaVariant *variant,
                                 Module **module);
HIDDEN void module_release(const Driver *driver, Module *module);

#endif
