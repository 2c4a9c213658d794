/*
 * A node of the CUDA provider. Its creation finds the device, loads the code made for it and copies the weight's
 * structure there; a run only launches kernels on ONNX Runtime's stream, so that it can be captured in a CUDA graph.
 */
#include "cuda_driver.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What cudaMalloc aligns to, and so ONNX Runtime its tensors. */
#define ALIGNMENT 256

/* The widest load of a kernel, in bytes. */
#define WIDEST_LOAD 16

/* Dynamic shared memory that a kernel may have without asking, in bytes. */
#define PLAIN_SHARED (48 << 10)

/* Blocks a grid may have in its first dimension. */
#define MAX_BLOCKS INT32_MAX

/* A variant in the device: the module, and the device function of each launch. */
typedef struct {
    Module *module;
    CUfunction functions[MAX_LAUNCHES];
} Loaded;

/* Nothing changes while it runs. What creation did not come to is NULL. */
typedef struct {
    Node node;
    const Driver *driver;
    /* ONNX Runtime's memory of the device. */
    OrtAllocator *allocator;
    const OrtMemoryInfo *memory;
    CUdevice device;
    CUcontext context;
    int multiprocessors;
    /* The kernel's variants for one architecture, and what is loaded of them. */
    const CudaVariant *variants;
    size_t variant_count;
    Loaded *loaded;
    /* One allocation, with indices, indptr and order at their places in it. */
    CUdeviceptr structure;
    CUdeviceptr indices;
    CUdeviceptr indptr;
    CUdeviceptr order;
    /* ONNX Runtime's own Add, for residuals that broadcast. */
    OrtOp *add;
} CudaNode;

static int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

/* ---- Choosing code for the device ---- */

typedef struct {
    int capability;
    int shared_bytes;
} Limits;

/* The variant that is the first of the next architecture, or the last with no architecture. */
static const CudaVariant *next_arch(const CudaVariant *variant) {
    while (variant->max_rows != INT64_MAX)
        variant++;
    return variant + 1;
}

static bool fits(const CudaVariant *variants, const Limits *limits) {
    const CudaVariant *end = next_arch(variants);
    for (const CudaVariant *variant = variants; variant < end; variant++)
        for (int i = 0; i < variant->launch_count; i++)
            if (variant->launches[i].shared_bytes > (unsigned)limits->shared_bytes)
                return false;
    if (variants->exact)
        return variants->capability == limits->capability;
    /* Machine code runs on later minor versions of its own major version, PTX on all that came later. */
    return variants->capability <= limits->capability &&
           (variants->ptx || variants->capability / 10 == limits->capability / 10);
}

static bool is_better(const CudaVariant *a, const CudaVariant *b) {
    if (a->ptx != b->ptx)
        return b->ptx;
    return a->capability != b->capability ? a->capability > b->capability : a->exact;
}

/* "sm_80, sm_90a and compute_90"; cut off where `text` ends. */
static const char *print_archs(const CudaVariant *variants, char *text, size_t size) {
    size_t used = 0;
    while (variants->arch && used < size) {
        const CudaVariant *next = next_arch(variants);
        const char *separator = used == 0 ? "" : next->arch ? ", " : " and ";
        used += (size_t)snprintf(text + used, size - used, "%s%s", separator, variants->arch);
        variants = next;
    }
    return text;
}

static OrtStatus *choose_variants(CudaNode *cuda, const Limits *limits) {
    for (const CudaVariant *arch = cuda->node.kernel->cuda; arch->arch; arch = next_arch(arch))
        if (fits(arch, limits) && (!cuda->variants || is_better(arch, cuda->variants)))
            cuda->variants = arch;
    if (cuda->variants)
        return NULL;
    char archs[256];
    return node_error(&cuda->node, ORT_NOT_IMPLEMENTED,
                      "this GPU is sm_%d, the library has code for %s: compile again with --target cuda:sm_%d or auto",
                      limits->capability, print_archs(cuda->node.kernel->cuda, archs, sizeof archs),
                      limits->capability);
}

static OrtStatus *find_device(CudaNode *cuda, const OrtKernelInfo *info, Limits *limits) {
    const OrtApi *api = cuda->node.api;
    const Driver *driver = cuda->driver;
    int ordinal, major, minor;
    TRY(api->KernelInfoGetAllocator(info, ORT_MEMORY_DEFAULT, &cuda->allocator));
    TRY(api->AllocatorGetInfo(cuda->allocator, &cuda->memory));
    TRY(api->MemoryInfoGetId(cuda->memory, &ordinal));
    TRY_CUDA(&cuda->node, driver, cuDeviceGet, &cuda->device, ordinal);
    const struct {
        CUdevice_attribute attribute;
        int *value;
    } attributes[] = {
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, &major},
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, &minor},
        {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, &cuda->multiprocessors},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, &limits->shared_bytes},
    };
    for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
        TRY_CUDA(&cuda->node, driver, cuDeviceGetAttribute, attributes[i].value, attributes[i].attribute,
                 cuda->device);
    limits->capability = 10 * major + minor;
    return NULL;
}

/* ---- Preparing the device; its context is current ---- */

static OrtStatus *load_variant(CudaNode *cuda, const CudaVariant *variant, Loaded *loaded) {
    const Node *node = &cuda->node;
    const Driver *driver = cuda->driver;
    TRY(module_acquire(node, driver, cuda->device, variant, &loaded->module));
    for (int i = 0; i < variant->launch_count; i++) {
        const Launch *launch = &variant->launches[i];
        TRY_CUDA(node, driver, cuModuleGetFunction, &loaded->functions[i], loaded->module->handle, launch->entry);
        if (launch->shared_bytes > PLAIN_SHARED)
            TRY_CUDA(node, driver, cuFuncSetAttribute, loaded->functions[i],
                     CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)launch->shared_bytes);
    }
    return NULL;
}

static OrtStatus *load_variants(CudaNode *cuda) {
    cuda->variant_count = (size_t)(next_arch(cuda->variants) - cuda->variants);
    cuda->loaded = calloc(cuda->variant_count, sizeof *cuda->loaded);
    if (!cuda->loaded)
        return node_error(&cuda->node, ORT_FAIL, "out of memory");
    for (size_t i = 0; i < cuda->variant_count; i++)
        TRY(load_variant(cuda, &cuda->variants[i], &cuda->loaded[i]));
    return NULL;
}

typedef struct {
    int32_t blocks;
    int32_t row;
} BlockRow;

/* More blocks first, the first of equals first. */
static int compare_block_rows(const void *left, const void *right) {
    const BlockRow *a = left, *b = right;
    if (a->blocks != b->blocks)
        return a->blocks > b->blocks ? -1 : 1;
    return a->row > b->row ? 1 : -1;
}

/* order [block rows]: the block rows by falling number of blocks, so that the longest do not begin last. */
static OrtStatus *order_block_rows(const Node *node, int32_t *order) {
    BlockRow *rows = malloc((size_t)node->block_rows * sizeof *rows);
    if (!rows)
        return node_error(node, ORT_FAIL, "out of memory");
    for (int64_t i = 0; i < node->block_rows; i++)
        rows[i] = (BlockRow){node->indptr[i + 1] - node->indptr[i], (int32_t)i};
    qsort(rows, (size_t)node->block_rows, sizeof *rows, compare_block_rows);
    for (int64_t i = 0; i < node->block_rows; i++)
        order[i] = rows[i].row;
    free(rows);
    return NULL;
}

static size_t aligned(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static OrtStatus *allocate(CudaNode *cuda, size_t bytes) {
    CUresult error = cuda->driver->cuMemAlloc_v2(&cuda->structure, bytes);
    if (!error)
        return NULL;
    char what[96];
    snprintf(what, sizeof what, "allocating %zu bytes of GPU memory", bytes);
    return driver_error(&cuda->node, cuda->driver, error, what);
}

static OrtStatus *upload(CudaNode *cuda, const void *source, size_t bytes) {
    TRY(allocate(cuda, bytes));
    TRY_CUDA(&cuda->node, cuda->driver, cuMemcpyHtoD_v2, cuda->structure, source, bytes);
    /* A copy from pageable memory may return before it is done, and ONNX Runtime's stream does not wait for it. */
    TRY_CUDA(&cuda->node, cuda->driver, cuStreamSynchronize, NULL);
    return NULL;
}

static OrtStatus *upload_structure(CudaNode *cuda) {
    const Node *node = &cuda->node;
    size_t indices = (size_t)node->blocks * sizeof(int32_t), indptr = (size_t)(node->block_rows + 1) * sizeof(int32_t);
    size_t indptr_at = aligned(indices), order_at = indptr_at + aligned(indptr);
    size_t bytes = order_at + aligned((size_t)node->block_rows * sizeof(int32_t));
    char *structure = calloc(1, bytes);
    if (!structure)
        return node_error(node, ORT_FAIL, "out of memory");
    if (indices)
        memcpy(structure, node->indices, indices);
    memcpy(structure + indptr_at, node->indptr, indptr);
    OrtStatus *status = order_block_rows(node, (int32_t *)(structure + order_at));
    if (!status)
        status = upload(cuda, structure, bytes);
    free(structure);
    cuda->indices = cuda->structure;
    cuda->indptr = cuda->structure + indptr_at;
    cuda->order = cuda->structure + order_at;
    return status;
}

/* ---- Creation ---- */

static OrtStatus *prepare_device(CudaNode *cuda) {
    TRY(load_variants(cuda));
    return upload_structure(cuda);
}

static OrtStatus *create_add(CudaNode *cuda, const OrtKernelInfo *info) {
    const char *constraint = "T";
    /* Version 14 is the first with bfloat16. */
    return cuda->node.api->CreateOp(info, "Add", "", 14, &constraint, &cuda->node.kernel->type, 1, NULL, 0, 2, 1,
                                    &cuda->add);
}

static OrtStatus *prepare(CudaNode *cuda, const OrtApi *api, const OrtKernelInfo *info) {
    Node *node = &cuda->node;
    Limits limits;
    TRY(node_find(node, api, info));
    TRY(node_check(node, info));
    TRY(driver_open(node, &cuda->driver));
    TRY(find_device(cuda, info, &limits));
    TRY(choose_variants(cuda, &limits));
    if (node->kernel->has_residual)
        TRY(create_add(cuda, info));
    TRY_CUDA(node, cuda->driver, cuDevicePrimaryCtxRetain, &cuda->context, cuda->device);
    TRY_CUDA(node, cuda->driver, cuCtxPushCurrent_v2, cuda->context);
    OrtStatus *status = prepare_device(cuda);
    CUcontext popped;
    cuda->driver->cuCtxPopCurrent_v2(&popped);
    return status;
}

OrtStatus *cuda_create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **result) {
    (void)op;
    CudaNode *cuda = calloc(1, sizeof *cuda);
    if (!cuda)
        return api->CreateStatus(ORT_FAIL, "SparseLinear: out of memory");
    OrtStatus *status = prepare(cuda, api, info);
    if (status) {
        cuda_destroy(cuda);
        return status;
    }
    *result = cuda;
    return NULL;
}

/* What the driver holds for the node. Errors have no one to be told to, and in a process that ends they are normal. */
static void release_device(CudaNode *cuda) {
    const Driver *driver = cuda->driver;
    CUcontext popped;
    bool current = !driver->cuCtxPushCurrent_v2(cuda->context);
    if (cuda->structure)
        driver->cuMemFree_v2(cuda->structure);
    for (size_t i = 0; cuda->loaded && i < cuda->variant_count; i++)
        if (cuda->loaded[i].module)
            module_release(driver, cuda->loaded[i].module);
    if (current)
        driver->cuCtxPopCurrent_v2(&popped);
    driver->cuDevicePrimaryCtxRelease_v2(cuda->device);
}

void cuda_destroy(void *data) {
    CudaNode *cuda = data;
    const OrtApi *api = cuda->node.api;
    if (cuda->context)
        release_device(cuda);
    if (cuda->add)
        api->ReleaseOp(cuda->add);
    if (cuda->allocator)
        api->ReleaseAllocator(cuda->allocator);
    free(cuda->loaded);
    free(cuda);
}

/* ---- One run ---- */

/*
 * Scratch memory of one run. It comes from ONNX Runtime's arena and belongs to the run's stream, as that of its own
 * operators does, hence:
 * - Giving it back while kernels that use it still wait is right: who gets it next in the same stream comes after them,
 *   and ONNX Runtime hands it to another stream only after the two have synchronised.
 * - A run that is captured in a CUDA graph may use it: ONNX Runtime runs a model before it captures it, so the arena is
 *   large enough by then and calls no function of the driver, and it keeps what a graph may point to.
 */
static OrtStatus *take_scratch(const CudaNode *cuda, const OrtKernelContext *context, int64_t bytes, void **scratch) {
    return cuda->node.api->KernelContext_GetScratchBuffer(context, cuda->memory, (size_t)bytes, scratch);
}

/* Gives `scratch` back after what ended with `status`, which comes first. */
static OrtStatus *give_scratch(const CudaNode *cuda, void *scratch, OrtStatus *status) {
    const OrtApi *api = cuda->node.api;
    OrtStatus *freed = scratch ? api->AllocatorFree(cuda->allocator, scratch) : NULL;
    if (!status)
        return freed;
    if (freed)
        api->ReleaseStatus(freed);
    return status;
}

/* What all launches of a run share: the variant, the stream, and the values of `CUDA_ARGUMENTS`. */
typedef struct {
    const CudaNode *cuda;
    size_t variant;
    int64_t rows;
    CUstream stream;
    uint64_t arguments[CUDA_ARGUMENT_COUNT];
} Job;

static OrtStatus *launch_one(Job *job, size_t index) {
    const CudaNode *cuda = job->cuda;
    const Launch *launch = &cuda->variants[job->variant].launches[index];
    int64_t tiles = ceil_div(job->rows, launch->tile_rows);
    if (tiles > MAX_BLOCKS / launch->units)
        return node_error(&cuda->node, ORT_INVALID_ARGUMENT,
                          "X has %" PRId64 " rows, expected at most %" PRId64 "; split the batch", job->rows,
                          MAX_BLOCKS / launch->units * launch->tile_rows);
    int64_t blocks = launch->units * tiles, resident = launch->blocks_per_sm * cuda->multiprocessors;
    if (resident && blocks > resident)
        blocks = resident;
    void *parameters[CUDA_ARGUMENT_COUNT];
    for (int i = 0; i < launch->argument_count; i++)
        parameters[i] = &job->arguments[launch->arguments[i]];
    CUresult error = cuda->driver->cuLaunchKernel(cuda->loaded[job->variant].functions[index], (unsigned)blocks, 1, 1,
                                                  launch->threads, 1, 1, launch->shared_bytes, job->stream, parameters,
                                                  NULL);
    if (!error)
        return NULL;
    char what[320];
    snprintf(what, sizeof what, "launching '%s' of kernel '%s'", launch->entry, cuda->node.kernel->name);
    return driver_error(&cuda->node, cuda->driver, error, what);
}

static OrtStatus *launch_all(Job *job) {
    for (int i = 0; i < job->cuda->variants[job->variant].launch_count; i++)
        TRY(launch_one(job, (size_t)i));
    return NULL;
}

/* y [rows, N] = activation(x [rows, K] times the weight + bias) + residual [rows, N]; the context is current. */
static OrtStatus *multiply(const CudaNode *cuda, const OrtKernelContext *context, CUstream stream, const Run *run,
                           const void *residual, void *y) {
    const Node *node = &cuda->node;
    Job job = {
        .cuda = cuda,
        .rows = run->rows,
        .stream = stream,
        .arguments =
            {
                [CUDA_X] = (uintptr_t)run->x.data,
                [CUDA_VALUES] = (uintptr_t)node->values,
                [CUDA_INDICES] = cuda->indices,
                [CUDA_INDPTR] = cuda->indptr,
                [CUDA_ORDER] = cuda->order,
                [CUDA_BIAS] = (uintptr_t)node->bias,
                [CUDA_RESIDUAL] = (uintptr_t)residual,
                [CUDA_Y] = (uintptr_t)y,
                [CUDA_ROWS] = (uint64_t)run->rows,
            },
    };
    while (cuda->variants[job.variant].max_rows < run->rows)
        job.variant++;
    const CudaVariant *variant = &cuda->variants[job.variant];
    void *workspace = NULL;
    if (variant->workspace) {
        int64_t tile_rows = variant->launches[0].tile_rows;
        int64_t rows = ceil_div(run->rows, tile_rows) * tile_rows;
        TRY(take_scratch(cuda, context, variant->workspace * rows * (int64_t)sizeof(float), &workspace));
    }
    job.arguments[CUDA_WORKSPACE] = (uintptr_t)workspace;
    return give_scratch(cuda, workspace, launch_all(&job));
}

/* Fills `y` with the identity of addition: unlike +0, -0 leaves -0 as it is. */
static OrtStatus *fill_no_residual(const CudaNode *cuda, CUstream stream, void *y, int64_t size) {
    if (cuda->node.kernel->type == ORT_TENSOR_FLOAT)
        TRY_CUDA(&cuda->node, cuda->driver, cuMemsetD32Async, (uintptr_t)y, 0x80000000u, (size_t)size, stream);
    else
        TRY_CUDA(&cuda->node, cuda->driver, cuMemsetD16Async, (uintptr_t)y, 0x8000u, (size_t)size, stream);
    return NULL;
}

static OrtStatus *add_residual(const CudaNode *cuda, const OrtKernelContext *context, const Run *run, void *product,
                               size_t bytes) {
    const OrtApi *api = cuda->node.api;
    OrtValue *value;
    TRY(api->CreateTensorWithDataAsOrtValue(cuda->memory, product, bytes, run->product.dims, run->product.rank,
                                            cuda->node.kernel->type, &value));
    const OrtValue *const inputs[] = {value, run->residual_value};
    OrtStatus *status = api->InvokeOp(context, cuda->add, inputs, 2, &run->y_value, 1);
    api->ReleaseValue(value);
    return status;
}

/* The product plus a residual of another shape. The product goes to scratch memory, and y, which is as large at least,
 * first lends itself as its residual. ONNX Runtime adds the real one, on the same stream. */
static OrtStatus *multiply_broadcast(const CudaNode *cuda, const OrtKernelContext *context, CUstream stream,
                                     const Run *run) {
    int64_t size = shape_count(&run->product, run->product.rank);
    int64_t bytes = size * (cuda->node.kernel->type == ORT_TENSOR_FLOAT ? 4 : 2);
    void *product;
    TRY(take_scratch(cuda, context, bytes, &product));
    OrtStatus *status = fill_no_residual(cuda, stream, run->y, size);
    if (!status)
        status = multiply(cuda, context, stream, run, run->y, product);
    if (!status)
        status = add_residual(cuda, context, run, product, (size_t)bytes);
    return give_scratch(cuda, product, status);
}

/* A kernel that met another address would end the process's work on this GPU. */
static OrtStatus *check_alignment(const CudaNode *cuda, const Run *run) {
    const struct {
        const char *name;
        const void *data;
    } tensors[] = {{"X", run->x.data}, {"residual", run->residual.data}, {"Y", run->y}};
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++)
        if ((uintptr_t)tensors[i].data % WIDEST_LOAD)
            return node_error(&cuda->node, ORT_INVALID_ARGUMENT,
                              "%s starts at address %p, expected a multiple of %d; bind another buffer",
                              tensors[i].name, tensors[i].data, WIDEST_LOAD);
    return NULL;
}

OrtStatus *cuda_compute(void *data, OrtKernelContext *context) {
    const CudaNode *cuda = data;
    const Node *node = &cuda->node;
    Run run;
    void *stream;
    TRY(node_begin(node, context, &run));
    if (shape_count(&run.sum, run.sum.rank) == 0)
        return NULL;
    TRY(check_alignment(cuda, &run));
    TRY(node->api->KernelContext_GetGPUComputeStream(context, &stream));
    /* ONNX Runtime may run on a thread that has used another device, or none. */
    TRY_CUDA(node, cuda->driver, cuCtxPushCurrent_v2, cuda->context);
    OrtStatus *status = run.broadcasts ? multiply_broadcast(cuda, context, stream, &run)
                                       : multiply(cuda, context, stream, &run, run.residual.data, run.y);
    CUcontext popped;
    cuda->driver->cuCtxPopCurrent_v2(&popped);
    return status;
}
