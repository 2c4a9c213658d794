/*
 * Creates, runs and destroys nodes of the CUDA provider with a double of ONNX Runtime.
 *
 *     harness LIBRARY TYPE DEVICES SHAPES [residual ["threads"]]
 *
 * TYPE is an element type of ONNX, DEVICES such as "0,0,1" has a node each, SHAPES such as "2,3;0" a run of each node
 * on an X [2, 3, 8] and one on an X [0, 8]. `residual` is the shape of a residual, "-" stands for none. With "threads"
 * each node is created and run in a thread of its own. The weight is [6, 8] in three block rows of 2 outputs with 2, 2
 * and 3 blocks of 2 inputs; its kernel must be called "plain".
 *
 * Tensors in device memory are addresses that nobody may touch. Every status is printed and must be released, and so
 * must every other thing that ONNX Runtime hands out.
 */
#include "ort_api.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct OrtStatus {
    char message[1024];
};

struct OrtTensorTypeAndShapeInfo {
    OrtTensorType type;
    size_t rank;
    int64_t dims[8];
};

struct OrtValue {
    OrtTensorTypeAndShapeInfo info;
    void *data;
};

/* OrtKernelInfo, OrtAllocator and OrtMemoryInfo are all the device's number. */
struct OrtKernelInfo {
    int device;
};

struct OrtKernelContext {
    OrtValue inputs[6];
    OrtValue output;
    int scratches;
};

static OrtTensorType type;
static OrtTensorTypeAndShapeInfo residual;
static bool has_residual;
static int32_t indices[] = {2, 4, 0, 2, 1, 4, 6}, indptr[] = {0, 2, 4, 7};

#define ADDRESS(number) ((void *)(uintptr_t)((number) * 0x10000))
enum { STREAM = 1, X, VALUES, BIAS, RESIDUAL, Y, SCRATCH };

static _Atomic int held;

/* ---- The double ---- */

static OrtStatus *create_status(OrtErrorCode code, const char *message) {
    OrtStatus *status = malloc(sizeof *status);
    (void)code;
    snprintf(status->message, sizeof status->message, "%s", message);
    return status;
}

static void release_status(OrtStatus *status) { free(status); }

static const OrtCustomOp *cuda_op;

static OrtStatus *create_domain(const char *name, OrtCustomOpDomain **domain) {
    (void)name;
    *domain = ADDRESS(1);
    return NULL;
}

static OrtStatus *domain_add(OrtCustomOpDomain *domain, const OrtCustomOp *op) {
    (void)domain;
    if (!strcmp(op->GetExecutionProviderType(op), "CUDAExecutionProvider") && op->GetInputType(op, 0) == type)
        cuda_op = op;
    return NULL;
}

static OrtStatus *add_domain(OrtSessionOptions *options, OrtCustomOpDomain *domain) {
    (void)options, (void)domain;
    return NULL;
}

static void release_domain(OrtCustomOpDomain *domain) { (void)domain; }

static OrtStatus *get_data(OrtValue *value, void **data) {
    *data = value->data;
    return NULL;
}

static OrtStatus *get_info(const OrtValue *value, OrtTensorTypeAndShapeInfo **info) {
    held++;
    *info = (OrtTensorTypeAndShapeInfo *)&value->info;
    return NULL;
}

static void release_info(OrtTensorTypeAndShapeInfo *info) {
    (void)info;
    held--;
}

static OrtStatus *get_type(const OrtTensorTypeAndShapeInfo *info, OrtTensorType *result) {
    *result = info->type;
    return NULL;
}

static OrtStatus *get_rank(const OrtTensorTypeAndShapeInfo *info, size_t *count) {
    *count = info->rank;
    return NULL;
}

static OrtStatus *get_dims(const OrtTensorTypeAndShapeInfo *info, int64_t *dims, size_t count) {
    memcpy(dims, info->dims, count * sizeof *dims);
    return NULL;
}

static OrtStatus *get_integer(const OrtKernelInfo *info, const char *name, int64_t *value) {
    static const struct {
        const char *name;
        int64_t value;
    } attributes[] = {{"in_features", 8}, {"out_features", 6}, {"block_rows", 2}, {"block_cols", 2}, {"threads", 1}};
    (void)info;
    for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
        if (!strcmp(attributes[i].name, name))
            *value = attributes[i].value;
    return NULL;
}

static OrtStatus *get_string(const OrtKernelInfo *info, const char *name, char *value, size_t *size) {
    (void)info, (void)name;
    *size = sizeof "plain";
    memcpy(value, "plain", *size);
    return NULL;
}

static OrtStatus *get_node_name(const OrtKernelInfo *info, char *name, size_t *size) {
    (void)info;
    *size = sizeof "fc1";
    memcpy(name, "fc1", *size);
    return NULL;
}

static OrtStatus *get_input_count(const OrtKernelInfo *info, size_t *count) {
    (void)info;
    *count = has_residual ? 6 : 5;
    return NULL;
}

static OrtStatus *get_input_name(const OrtKernelInfo *info, size_t index, char *name, size_t *size) {
    (void)info, (void)index, (void)name;
    *size = 2;
    return NULL;
}

static OrtValue constants[] = {
    [1] = {{0, 1, {28}}, NULL},
    [2] = {{ORT_TENSOR_INT32, 1, {7}}, indices},
    [3] = {{ORT_TENSOR_INT32, 1, {4}}, indptr},
    [4] = {{0, 1, {6}}, NULL},
};

static OrtStatus *get_constant(const OrtKernelInfo *info, size_t index, int *constant, const OrtValue **value) {
    (void)info;
    *constant = 1;
    *value = &constants[index];
    return NULL;
}

static OrtStatus *get_allocator(const OrtKernelInfo *info, OrtMemoryType memory, OrtAllocator **allocator) {
    held++;
    *allocator = (OrtAllocator *)info;
    return memory == ORT_MEMORY_DEFAULT ? NULL : create_status(ORT_FAIL, "not the device's memory");
}

static void release_allocator(OrtAllocator *allocator) {
    (void)allocator;
    held--;
}

static OrtStatus *get_memory_info(const OrtAllocator *allocator, const OrtMemoryInfo **info) {
    *info = (const OrtMemoryInfo *)allocator;
    return NULL;
}

static OrtStatus *get_device(const OrtMemoryInfo *info, int *id) {
    *id = ((const OrtKernelInfo *)info)->device;
    return NULL;
}

static OrtStatus *create_op(const OrtKernelInfo *info, const char *name, const char *domain, int version,
                            const char **constraints, const OrtTensorType *types, int constraint_count,
                            const OrtOpAttr *const *attributes, int attribute_count, int input_count, int output_count,
                            OrtOp **op) {
    (void)info, (void)attributes;
    held++;
    *op = ADDRESS(1);
    bool right = !strcmp(name, "Add") && !*domain && version == 14 && constraint_count == 1 && *types == type;
    right = right && !strcmp(*constraints, "T") && !attribute_count && input_count == 2 && output_count == 1;
    return right ? NULL : create_status(ORT_FAIL, "no such operator");
}

static void release_op(OrtOp *op) {
    (void)op;
    held--;
}

static OrtStatus *create_tensor(const OrtMemoryInfo *info, void *data, size_t bytes, const int64_t *dims, size_t count,
                                OrtTensorType element, OrtValue **value) {
    (void)info;
    held++;
    *value = malloc(sizeof **value);
    **value = (OrtValue){.info = {element, count, {0}}, .data = data};
    memcpy((*value)->info.dims, dims, count * sizeof *dims);
    printf("tensor %p of %zu bytes\n", data, bytes);
    return NULL;
}

static void release_value(OrtValue *value) {
    held--;
    free(value);
}

static OrtStatus *invoke_op(const OrtKernelContext *context, const OrtOp *op, const OrtValue *const *inputs,
                            int input_count, OrtValue *const *outputs, int output_count) {
    (void)context, (void)op, (void)input_count, (void)output_count;
    printf("add %p and %p to %p\n", inputs[0]->data, inputs[1]->data, outputs[0]->data);
    return NULL;
}

static OrtStatus *get_input(const OrtKernelContext *context, size_t index, const OrtValue **value) {
    *value = &context->inputs[index];
    return NULL;
}

static OrtStatus *get_output(OrtKernelContext *context, size_t index, const int64_t *dims, size_t count,
                             OrtValue **value) {
    *value = &context->output;
    context->output = (OrtValue){.info = {type, count, {0}}, .data = ADDRESS(Y)};
    memcpy(context->output.info.dims, dims, count * sizeof *dims);
    flockfile(stdout);
    printf("output %zu of", index);
    for (size_t i = 0; i < count; i++)
        printf(" %ld", dims[i]);
    puts("");
    funlockfile(stdout);
    return NULL;
}

static OrtStatus *get_stream(const OrtKernelContext *context, void **stream) {
    (void)context;
    *stream = ADDRESS(STREAM);
    return NULL;
}

static OrtStatus *get_scratch(const OrtKernelContext *context, const OrtMemoryInfo *info, size_t bytes, void **memory) {
    if (getenv("NO_SCRATCH"))
        return create_status(ORT_FAIL, "the arena is exhausted");
    held++;
    *memory = ADDRESS(SCRATCH + ((OrtKernelContext *)context)->scratches++);
    printf("scratch %p of %zu bytes on %d\n", *memory, bytes, ((const OrtKernelInfo *)info)->device);
    return NULL;
}

static OrtStatus *give_scratch(OrtAllocator *allocator, void *memory) {
    held--;
    printf("free %p on %d\n", memory, ((OrtKernelInfo *)allocator)->device);
    return getenv("BAD_FREE") ? create_status(ORT_FAIL, "not of this arena") : NULL;
}

static const OrtApi api = {
    .CreateStatus = create_status,
    .CreateCustomOpDomain = create_domain,
    .CustomOpDomain_Add = domain_add,
    .AddCustomOpDomain = add_domain,
    .CreateTensorWithDataAsOrtValue = create_tensor,
    .GetTensorMutableData = get_data,
    .GetTensorElementType = get_type,
    .GetDimensionsCount = get_rank,
    .GetDimensions = get_dims,
    .GetTensorTypeAndShape = get_info,
    .MemoryInfoGetId = get_device,
    .AllocatorFree = give_scratch,
    .AllocatorGetInfo = get_memory_info,
    .KernelInfoGetAttribute_int64 = get_integer,
    .KernelInfoGetAttribute_string = get_string,
    .KernelContext_GetInput = get_input,
    .KernelContext_GetOutput = get_output,
    .ReleaseStatus = release_status,
    .ReleaseValue = release_value,
    .ReleaseTensorTypeAndShapeInfo = release_info,
    .ReleaseCustomOpDomain = release_domain,
    .ReleaseAllocator = release_allocator,
    .KernelContext_GetGPUComputeStream = get_stream,
    .CreateOp = create_op,
    .InvokeOp = invoke_op,
    .ReleaseOp = release_op,
    .KernelInfo_GetInputCount = get_input_count,
    .KernelInfo_GetInputName = get_input_name,
    .KernelInfo_GetNodeName = get_node_name,
    .KernelInfoGetConstantInput_tensor = get_constant,
    .KernelContext_GetScratchBuffer = get_scratch,
    .KernelInfoGetAllocator = get_allocator,
};

static const OrtApi *get_api(uint32_t version) { return version <= 18 ? &api : NULL; }

static const char *get_version(void) {
    const char *version = getenv("ORT_VERSION");
    return version ? version : "1.31.1";
}

/* ---- Nodes ---- */

static bool report(OrtStatus *status) {
    if (status) {
        printf("error: %s\n", status->message);
        release_status(status);
    }
    return !status;
}

static OrtTensorTypeAndShapeInfo parse_shape(const char *text) {
    OrtTensorTypeAndShapeInfo info = {.type = type};
    for (char *end; *text && *text != ';'; text = *end == ',' ? end + 1 : end)
        info.dims[info.rank++] = strtol(text, &end, 10);
    return info;
}

typedef struct {
    OrtKernelInfo info;
    const char *shapes;
    void *node;
} Thread;

static void *create_and_run(void *data) {
    Thread *thread = data;
    if (!report(cuda_op->CreateKernelV2(cuda_op, &api, &thread->info, &thread->node)))
        return NULL;
    for (const char *shape = thread->shapes; shape; shape = strchr(shape, ';') ? strchr(shape, ';') + 1 : NULL) {
        printf("run\n");
        OrtKernelContext context = {.inputs = {
            [0] = {parse_shape(shape), (char *)ADDRESS(X) + (getenv("MISALIGNED") ? 4 : 0)},
            [5] = {residual, ADDRESS(RESIDUAL)},
        }};
        context.inputs[0].info.dims[context.inputs[0].info.rank++] = 8;
        report(cuda_op->KernelComputeV2(thread->node, &context));
    }
    return NULL;
}

int main(int argc, char **argv) {
    void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (argc < 5 || !library) {
        printf("%s\n", library ? "too few arguments" : dlerror());
        return 1;
    }
    /* Without a buffer, and so complete whatever happens. */
    setvbuf(stdout, NULL, _IONBF, 0);
    type = (OrtTensorType)atoi(argv[2]);
    has_residual = argc > 5 && strcmp(argv[5], "-");
    if (has_residual)
        residual = parse_shape(argv[5]);
    constants[1] = (OrtValue){{type, 1, {28}}, ADDRESS(VALUES)};
    constants[4] = (OrtValue){{type, 1, {6}}, ADDRESS(BIAS)};

    OrtStatus *(*register_ops)(OrtSessionOptions *, const OrtApiBase *);
    *(void **)&register_ops = dlsym(library, "RegisterCustomOps");
    static const OrtApiBase base = {get_api, get_version};
    if (!report(register_ops(NULL, &base)) || !cuda_op) {
        printf("no operator\n");
        return 1;
    }
    Thread threads[16] = {0};
    pthread_t ids[16];
    int count = 0;
    for (const char *device = argv[3]; device; device = strchr(device, ',') ? strchr(device, ',') + 1 : NULL)
        threads[count++] = (Thread){{atoi(device)}, argv[4], NULL};
    for (int i = 0; i < count; i++)
        if (argc > 6)
            pthread_create(&ids[i], NULL, create_and_run, &threads[i]);
        else
            create_and_run(&threads[i]);
    for (int i = 0; argc > 6 && i < count; i++)
        pthread_join(ids[i], NULL);
    printf("destroy\n");
    for (int i = 0; i < count; i++)
        if (threads[i].node)
            cuda_op->KernelDestroy(threads[i].node);
    printf("held %d\n", held);
    return 0;
}
