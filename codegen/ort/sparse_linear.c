/*
 * ai.sparsec::SparseLinear for ONNX Runtime's CPU provider: what the operator looks like, the shape of its result, and
 * its registration.
 *
 * Y [..., N] = activation(X [..., K] times the packed weight + bias) + residual
 */
#include "sparse_linear.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* One ONNX Runtime's view of this library: there can be several in one process, each with its own API. */
typedef struct Registration {
    OrtCustomOp op; /* First, so that a pointer to it is a pointer to the registration. */
    const OrtApi *api;
    OrtCustomOpDomain *domain;
    struct Registration *next;
} Registration;

static _Atomic(Registration *) registrations;

/* ---- What the operator looks like ---- */

static const char *op_name(const OrtCustomOp *op) {
    (void)op;
    return "SparseLinear";
}

static const char *op_provider(const OrtCustomOp *op) {
    (void)op;
    return "CPUExecutionProvider";
}

static size_t op_input_count(const OrtCustomOp *op) {
    (void)op;
    return INPUT_COUNT;
}

static OrtTensorType op_input_type(const OrtCustomOp *op, size_t index) {
    (void)op;
    return index == INPUT_INDICES || index == INPUT_INDPTR ? ORT_TENSOR_INT32 : ORT_TENSOR_FLOAT;
}

static OrtArgumentKind op_input_kind(const OrtCustomOp *op, size_t index) {
    (void)op;
    return index == INPUT_BIAS || index == INPUT_RESIDUAL ? ORT_ARGUMENT_OPTIONAL : ORT_ARGUMENT_REQUIRED;
}

static OrtMemoryType op_input_memory(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return ORT_MEMORY_DEFAULT;
}

static size_t op_output_count(const OrtCustomOp *op) {
    (void)op;
    return 1;
}

static OrtTensorType op_output_type(const OrtCustomOp *op, size_t index) {
    (void)op, (void)index;
    return ORT_TENSOR_FLOAT;
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
    if (succeeded(api, api->SetTensorElementType(info, ORT_TENSOR_FLOAT)) &&
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

/* Sets the result's shape where it is certain. It never fails: creating the node reports what is wrong. */
static OrtStatus *op_infer_shape(const OrtCustomOp *op, OrtShapeInferContext *context) {
    const OrtApi *api = ((const Registration *)op)->api;
    SymbolicTensor result, residual;
    int64_t out_features;
    if (!read_symbolic(api, context, INPUT_X, &result) || result.shape.rank == 0 ||
        !read_out_features(api, context, &out_features))
        return NULL;
    result.shape.dims[result.shape.rank - 1] = out_features;
    result.names[result.shape.rank - 1] = "";
    bool added = read_symbolic(api, context, INPUT_RESIDUAL, &residual) && residual.type != ORT_TENSOR_UNDEFINED;
    if (is_known(&result) && (!added || keeps_shape(&residual, &result)))
        write_symbolic(api, context, &result);
    return NULL;
}

/* Before 1.24, ONNX Runtime follows a null pointer when it prepares to infer the shape of a node without an optional
 * input, before we are asked. */
static bool can_infer_shapes(const OrtApiBase *base) {
    int major = 0, minor = 0;
    return sscanf(base->GetVersionString(), "%d.%d", &major, &minor) == 2 && (major > 1 || minor >= 24);
}

static const OrtCustomOp sparse_linear = {
    .version = ORT_API_VERSION,
    .GetName = op_name,
    .GetExecutionProviderType = op_provider,
    .GetInputType = op_input_type,
    .GetInputTypeCount = op_input_count,
    .GetOutputType = op_output_type,
    .GetOutputTypeCount = op_output_count,
    .GetInputCharacteristic = op_input_kind,
    .GetOutputCharacteristic = op_output_kind,
    .GetInputMemoryType = op_input_memory,
    .CreateKernelV2 = node_create,
    .KernelComputeV2 = node_compute,
    .KernelDestroy = node_destroy,
};

/* ---- Registration ---- */

static void registration_free(Registration *registration) {
    if (registration->domain)
        registration->api->ReleaseCustomOpDomain(registration->domain);
    free(registration);
}

static OrtStatus *registration_fill(Registration *registration) {
    const OrtApi *api = registration->api;
    TRY(api->CreateCustomOpDomain("ai.sparsec", &registration->domain));
    return api->CustomOpDomain_Add(registration->domain, &registration->op);
}

static OrtStatus *registration_create(const OrtApi *api, const OrtApiBase *base, Registration **result) {
    Registration *registration = calloc(1, sizeof *registration);
    if (!registration)
        return api->CreateStatus(ORT_FAIL, "SparseLinear: out of memory");
    registration->op = sparse_linear;
    registration->op.InferOutputShapeFn = can_infer_shapes(base) ? op_infer_shape : NULL;
    registration->api = api;
    OrtStatus *status = registration_fill(registration);
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
