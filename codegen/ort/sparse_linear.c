/*
 * ai.sparsec::SparseLinear and QSparseLinear for ONNX Runtime's CPU and CUDA providers: what the operators look like,
 * the shape of their result, and their registration.
 *
 * Y [..., N] = activation(X [..., K] times the packed weight + bias) + residual, by QSparseLinear quantised to uint8
 *
 * ONNX Runtime wants an OrtCustomOp for each provider and combination of element types. Under one name the types of the
 * inputs must tell that of the output: hence two.
 */
#include "sparse_linear.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Element types of a kernel: of X, of values, of bias and residual, of Y. */
typedef struct {
    OrtTensorType x, values, other, y;
} Types;

/* The operator for one provider and one combination of types. */
typedef struct Operator {
    OrtCustomOp op; /* First, so that a pointer to it is a pointer to the whole. */
    const OrtApi *api;
    Types types;
    bool cuda;
    struct Operator *next;
} Operator;

/* One ONNX Runtime's view of this library: there can be several in one process, each with its own API. */
typedef struct Registration {
    const OrtApi *api;
    Operator *operators;
    OrtCustomOpDomain *domain;
    struct Registration *next;
} Registration;

static _Atomic(Registration *) registrations;

/* ---- What the operator looks like ---- */

static const Types *types_of(const OrtCustomOp *op) { return &((const Operator *)op)->types; }

OrtTensorType op_y_type(const OrtCustomOp *op) { return types_of(op)->y; }

static const char *op_name(const OrtCustomOp *op) {
    return types_of(op)->y == ORT_TENSOR_UINT8 ? "QSparseLinear" : "SparseLinear";
}

static const char *cpu_provider(const OrtCustomOp *op) {
    (void)op;
    return "CPUExecutionProvider";
}

static const char *cuda_provider(const OrtCustomOp *op) {
    (void)op;
    return "CUDAExecutionProvider";
}

static size_t op_input_count(const OrtCustomOp *op) {
    (void)op;
    return INPUT_COUNT;
}

static OrtTensorType op_input_type(const OrtCustomOp *op, size_t index) {
    switch (index) {
    case INPUT_X:
        return types_of(op)->x;
    case INPUT_VALUES:
        return types_of(op)->values;
    case INPUT_INDICES:
    case INPUT_INDPTR:
    case INPUT_SUMS:
        return ORT_TENSOR_INT32;
    case INPUT_TABLE:
        return ORT_TENSOR_FLOAT;
    default:
        return types_of(op)->other;
    }
}

static OrtArgumentKind op_input_kind(const OrtCustomOp *op, size_t index) {
    (void)op;
    return index >= INPUT_BIAS ? ORT_ARGUMENT_OPTIONAL : ORT_ARGUMENT_REQUIRED;
}

static OrtMemoryType cpu_input_memory(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return ORT_MEMORY_DEFAULT;
}

/* Creating a node checks the indices, on the host. */
static OrtMemoryType cuda_input_memory(const OrtCustomOp *op, size_t index) {
    (void)op;
    return index == INPUT_INDICES || index == INPUT_INDPTR ? ORT_MEMORY_CPU_INPUT : ORT_MEMORY_DEFAULT;
}

static size_t op_output_count(const OrtCustomOp *op) {
    (void)op;
    return 1;
}

static OrtTensorType op_output_type(const OrtCustomOp *op, size_t index) {
    (void)index;
    return types_of(op)->y;
}

static OrtArgumentKind op_output_kind(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return ORT_ARGUMENT_REQUIRED;
}

/* ---- The shape of the result ---- */

/* A tensor before the model runs. A dimension is a number, or -1 and a name, or -1 and an empty name; rank 0 also
 * stands for an unknown rank, and the type is undefined where an optional input is missing. */
typedef struct {
    OrtTensorType type;
    Shape shape;
    const char *names[MAX_RANK];
} SymbolicTensor;

static bool succeeded(const OrtApi *api, OrtStatus *status) {
    if (status)
        api->ReleaseStatus(status);
    return !status;
}

static bool read_symbolic(const OrtApi *api, const OrtShapeInferContext *context, size_t input,
                          SymbolicTensor *tensor) {
    OrtTensorTypeAndShapeInfo *info; /* The context keeps it. */
    Shape *shape = &tensor->shape;
    return succeeded(api, api->ShapeInferContext_GetInputTypeShape(context, input, &info)) &&
           succeeded(api, api->GetTensorElementType(info, &tensor->type)) &&
           succeeded(api, api->GetDimensionsCount(info, &shape->rank)) && shape->rank <= MAX_RANK &&
           succeeded(api, api->GetDimensions(info, shape->dims, shape->rank)) &&
           succeeded(api, api->GetSymbolicDimensions(info, tensor->names, shape->rank));
}

static bool read_out_features(const OrtApi *api, const OrtShapeInferContext *context, int64_t *value) {
    const OrtOpAttr *attribute;
    size_t used;
    return succeeded(api, api->ShapeInferContext_GetAttribute(context, "out_features", &attribute)) &&
           succeeded(api, api->ReadOpAttr(attribute, ORT_ATTRIBUTE_INT, value, sizeof *value, &used));
}

static void write_symbolic(const OrtApi *api, const OrtShapeInferContext *context, SymbolicTensor *tensor) {
    OrtTensorTypeAndShapeInfo *info;
    if (!succeeded(api, api->CreateTensorTypeAndShapeInfo(&info)))
        return;
    if (succeeded(api, api->SetTensorElementType(info, tensor->type)) &&
        succeeded(api, api->SetDimensions(info, tensor->shape.dims, tensor->shape.rank)) &&
        succeeded(api, api->SetSymbolicDimensions(info, tensor->names, tensor->shape.rank)))
        succeeded(api, api->ShapeInferContext_SetOutputTypeShape(context, 0, info));
    api->ReleaseTensorTypeAndShapeInfo(info);
}

/* Whether every dimension has a number or a name: ONNX Runtime would write a nameless one into the graph as -1. */
static bool is_known(const SymbolicTensor *tensor) {
    for (size_t i = 0; i < tensor->shape.rank; i++)
        if (tensor->shape.dims[i] < 0 && !tensor->names[i][0])
            return false;
    return tensor->shape.rank > 0;
}

/* Whether adding `residual` surely leaves the shape of `product`, every dimension of which is known, as it is. */
static bool keeps_shape(const SymbolicTensor *residual, const SymbolicTensor *product) {
    if (residual->shape.rank == 0 || residual->shape.rank > product->shape.rank)
        return false;
    size_t missing = product->shape.rank - residual->shape.rank;
    for (size_t i = 0; i < residual->shape.rank; i++) {
        int64_t dim = residual->shape.dims[i];
        bool equal =
            dim == product->shape.dims[missing + i] && !strcmp(residual->names[i], product->names[missing + i]);
        if (dim != 1 && !equal)
            return false;
    }
    return true;
}

/* Sets the result's shape where it is certain; its type by that of X, because ONNX Runtime asks one operator for all
 * types of a name. It never fails: creating the node reports what is wrong. */
static OrtStatus *op_infer_shape(const OrtCustomOp *op, OrtShapeInferContext *context) {
    const OrtApi *api = ((const Operator *)op)->api;
    SymbolicTensor result, residual;
    int64_t out_features;
    if (!read_symbolic(api, context, INPUT_X, &result) || result.shape.rank == 0 ||
        !read_out_features(api, context, &out_features))
        return NULL;
    result.shape.dims[result.shape.rank - 1] = out_features;
    result.names[result.shape.rank - 1] = "";
    if (types_of(op)->y == ORT_TENSOR_UINT8)
        result.type = ORT_TENSOR_UINT8;
    else if (result.type == ORT_TENSOR_UINT8)
        result.type = ORT_TENSOR_FLOAT;
    bool added = read_symbolic(api, context, INPUT_RESIDUAL, &residual) && residual.type != ORT_TENSOR_UNDEFINED;
    if (is_known(&result) && (!added || keeps_shape(&residual, &result)))
        write_symbolic(api, context, &result);
    return NULL;
}

/* Whether this is ONNX Runtime 1.`minor` or later. */
static bool is_at_least(const OrtApiBase *base, int minor) {
    int major = 0, found = 0;
    return sscanf(base->GetVersionString(), "%d.%d", &major, &found) == 2 && (major > 1 || found >= minor);
}

/* ---- Registration ---- */

static const OrtCustomOp cpu_op = {
    .version = ORT_API_VERSION,
    .GetName = op_name,
    .GetExecutionProviderType = cpu_provider,
    .GetInputType = op_input_type,
    .GetInputTypeCount = op_input_count,
    .GetOutputType = op_output_type,
    .GetOutputTypeCount = op_output_count,
    .GetInputCharacteristic = op_input_kind,
    .GetOutputCharacteristic = op_output_kind,
    .GetInputMemoryType = cpu_input_memory,
    .CreateKernelV2 = cpu_create,
    .KernelComputeV2 = cpu_compute,
    .KernelDestroy = cpu_destroy,
};

/* In the place of `cuda_create` where ONNX Runtime has no scratch memory that belongs to a stream. */
static OrtStatus *refuse_old_runtime(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info,
                                     void **node) {
    (void)op, (void)info, (void)node;
    return api->CreateStatus(ORT_NOT_IMPLEMENTED,
                             "SparseLinear: on GPUs ONNX Runtime 1.18 or later is needed; update onnxruntime-gpu");
}

static OrtCustomOp make_op(const OrtApiBase *base, bool cuda) {
    OrtCustomOp op = cpu_op;
    /* Before 1.24, ONNX Runtime follows a null pointer when it prepares to infer the shape of a node without an
     * optional input, before we are asked. */
    op.InferOutputShapeFn = is_at_least(base, 24) ? op_infer_shape : NULL;
    if (!cuda)
        return op;
    op.GetExecutionProviderType = cuda_provider;
    op.GetInputMemoryType = cuda_input_memory;
    op.CreateKernelV2 = is_at_least(base, 18) ? cuda_create : refuse_old_runtime;
    op.KernelComputeV2 = cuda_compute;
    op.KernelDestroy = cuda_destroy;
    return op;
}

static Types kernel_types(const Kernel *kernel) {
    return (Types){.x = kernel->x_type, .values = kernel->value_type, .other = kernel->type, .y = kernel->y_type};
}

static bool is_registered(const Registration *registration, const Types *types, bool cuda) {
    for (const Operator *one = registration->operators; one; one = one->next)
        if (one->cuda == cuda && !memcmp(&one->types, types, sizeof *types))
            return true;
    return false;
}

static OrtStatus *add_operator(Registration *registration, const OrtApiBase *base, Types types, bool cuda) {
    const OrtApi *api = registration->api;
    if (is_registered(registration, &types, cuda))
        return NULL;
    Operator *added = malloc(sizeof *added);
    if (!added)
        return api->CreateStatus(ORT_FAIL, "SparseLinear: out of memory");
    *added = (Operator){
        .op = make_op(base, cuda), .api = api, .types = types, .cuda = cuda, .next = registration->operators};
    registration->operators = added;
    return api->CustomOpDomain_Add(registration->domain, &added->op);
}

/* One for each combination of types that the library has kernels of; for GPUs only where these have code for them: a
 * node of the CUDA provider that cannot run would keep the CPU provider from taking it. */
static OrtStatus *add_operators(Registration *registration, const OrtApiBase *base) {
    /* Every library has the operator for float32 on CPUs, which names a missing kernel. */
    const Types plain = {ORT_TENSOR_FLOAT, ORT_TENSOR_FLOAT, ORT_TENSOR_FLOAT, ORT_TENSOR_FLOAT};
    TRY(add_operator(registration, base, plain, false));
    for (const Kernel *kernel = sparsec_kernels; kernel->name; kernel++) {
        TRY(add_operator(registration, base, kernel_types(kernel), false));
        if (kernel->cuda)
            TRY(add_operator(registration, base, kernel_types(kernel), true));
    }
    return NULL;
}

static void registration_free(Registration *registration) {
    if (registration->domain)
        registration->api->ReleaseCustomOpDomain(registration->domain);
    while (registration->operators) {
        Operator *next = registration->operators->next;
        free(registration->operators);
        registration->operators = next;
    }
    free(registration);
}

static OrtStatus *registration_fill(Registration *registration, const OrtApiBase *base) {
    TRY(registration->api->CreateCustomOpDomain("ai.sparsec", &registration->domain));
    return add_operators(registration, base);
}

static OrtStatus *registration_create(const OrtApi *api, const OrtApiBase *base, Registration **result) {
    Registration *registration = calloc(1, sizeof *registration);
    if (!registration)
        return api->CreateStatus(ORT_FAIL, "SparseLinear: out of memory");
    registration->api = api;
    OrtStatus *status = registration_fill(registration, base);
    if (status) {
        registration_free(registration);
        return status;
    }
    registration->next = atomic_load(&registrations);
    while (!atomic_compare_exchange_weak(&registrations, &registration->next, registration)) {
    }
    *result = registration;
    return NULL;
}

/* Session options and sessions point to the domain, so it lives as long as the library is loaded. */
static __attribute__((destructor)) void release_registrations(void) {
    Registration *registration = atomic_exchange(&registrations, NULL);
    while (registration) {
        Registration *next = registration->next;
        registration_free(registration);
        registration = next;
    }
}

__attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base);

OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    char message[256];
    const OrtApi *api = base->GetApi(ORT_API_VERSION);
    if (!api) {
        snprintf(message, sizeof message, "ai.sparsec: this is ONNX Runtime %s, expected 1.%d or later",
                 base->GetVersionString(), ORT_API_VERSION);
        return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, message);
    }
    const char *missing = sparsec_missing_instructions();
    if (missing) {
        snprintf(message, sizeof message,
                 "ai.sparsec: this library was compiled for processors with %s, which this one lacks; "
                 "compile the model again for this machine",
                 missing);
        return api->CreateStatus(ORT_NOT_IMPLEMENTED, message);
    }
    Registration *registration = atomic_load(&registrations);
    while (registration && registration->api != api)
        registration = registration->next;
    if (!registration)
        TRY(registration_create(api, base, &registration));
    return api->AddCustomOpDomain(options, registration->domain);
}
