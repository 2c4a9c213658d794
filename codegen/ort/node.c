/* What every provider's node checks: all that can be, once, when it is created, so that a run only multiplies. */
#include "sparse_linear.h"

#include <float.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Threads that a node may ask for; more than any machine has, few enough that no product of it overflows. */
#define MAX_THREADS 4096

#define DAMAGED "the model is damaged: compile it again"
/* A path that is loaded is not read again while any session holds it. */
#define MISMATCH                                                                                                       \
    "the model and the library come from different compilations, or a session of this process still holds an older "   \
    "library of the same path"

const char *const input_names[INPUT_COUNT] = {"X", "values", "indices", "indptr", "bias", "residual", "table", "sums"};

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

OrtStatus *node_error(const Node *node, OrtErrorCode code, const char *format, ...) {
    char message[1024];
    int prefix = snprintf(message, sizeof message, "SparseLinear '%s': ", node->name);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message + prefix, sizeof message - (size_t)prefix, format, arguments);
    va_end(arguments);
    return node->api->CreateStatus(code, message);
}

/* ---- Reading tensors ---- */

static OrtStatus *read_info(const Node *node, size_t input, const OrtTensorTypeAndShapeInfo *info, Tensor *tensor) {
    const OrtApi *api = node->api;
    TRY(api->GetTensorElementType(info, &tensor->type));
    TRY(api->GetDimensionsCount(info, &tensor->shape.rank));
    if (tensor->shape.rank > MAX_RANK)
        return node_error(node, ORT_INVALID_ARGUMENT, "%s has %zu dimensions, expected at most %d", input_names[input],
                          tensor->shape.rank, MAX_RANK);
    return api->GetDimensions(info, tensor->shape.dims, tensor->shape.rank);
}

/* Describes input number `input`; an error where it is missing, has another type or too many dimensions. */
static OrtStatus *read_tensor(const Node *node, size_t input, const OrtValue *value, OrtTensorType type,
                              Tensor *tensor) {
    const OrtApi *api = node->api;
    if (!value)
        return node_error(node, ORT_INVALID_ARGUMENT, "%s is missing", input_names[input]);
    OrtTensorTypeAndShapeInfo *info;
    TRY(api->GetTensorTypeAndShape(value, &info));
    OrtStatus *status = read_info(node, input, info, tensor);
    api->ReleaseTensorTypeAndShapeInfo(info);
    if (status)
        return status;
    if (tensor->type != type)
        return node_error(node, ORT_INVALID_GRAPH, "%s is %s, expected %s of kernel '%s'", input_names[input],
                          type_name(tensor->type), type_name(type), node->kernel->name);
    /* "Mutable" is the API's only accessor; what is behind a const value is only read. */
    return api->GetTensorMutableData((OrtValue *)value, &tensor->data);
}

/* Whether the node names this input, as opposed to leaving it out. */
static OrtStatus *is_given(const Node *node, const OrtKernelInfo *info, size_t input, bool *given) {
    const OrtApi *api = node->api;
    size_t count, length = 0;
    TRY(api->KernelInfo_GetInputCount(info, &count));
    if (input < count)
        TRY(api->KernelInfo_GetInputName(info, input, NULL, &length));
    *given = length > 1; /* The length counts the terminating zero. */
    return NULL;
}

static OrtStatus *read_constant(const Node *node, const OrtKernelInfo *info, size_t input, OrtTensorType type,
                                Tensor *tensor) {
    int constant = 0;
    const OrtValue *value = NULL;
    bool given;
    TRY(is_given(node, info, input, &given));
    if (!given)
        return node_error(node, ORT_INVALID_GRAPH, "%s is missing, expected an initializer; " DAMAGED, input_names[input]);
    TRY(node->api->KernelInfoGetConstantInput_tensor(info, input, &constant, &value));
    if (!constant)
        return node_error(node, ORT_INVALID_GRAPH,
                          "%s is computed or fed, expected an initializer of the node's own graph", input_names[input]);
    return read_tensor(node, input, value, type, tensor);
}

/* ---- Finding the kernel ---- */

OrtStatus *node_find(Node *node, const OrtApi *api, const OrtKernelInfo *info) {
    node->api = api;
    char name[sizeof node->name];
    size_t size = sizeof node->name;
    OrtStatus *status = api->KernelInfo_GetNodeName(info, node->name, &size);
    bool named = !status && size > 1;
    if (status)
        api->ReleaseStatus(status);

    size = sizeof name;
    status = api->KernelInfoGetAttribute_string(info, "kernel", name, &size);
    if (status) {
        api->ReleaseStatus(status);
        return node_error(node, ORT_INVALID_GRAPH, "attribute 'kernel' is missing or no short string; " DAMAGED);
    }
    if (!named)
        memcpy(node->name, name, size);
    for (const Kernel *kernel = sparsec_kernels; kernel->name; kernel++)
        if (!strcmp(kernel->name, name)) {
            node->kernel = kernel;
            return NULL;
        }
    return node_error(node, ORT_INVALID_GRAPH,
                      "this library has no kernel '%s'; " MISMATCH, name);
}

static OrtStatus *read_attribute(const Node *node, const OrtKernelInfo *info, const char *name, int64_t *value) {
    OrtStatus *status = node->api->KernelInfoGetAttribute_int64(info, name, value);
    if (!status)
        return NULL;
    node->api->ReleaseStatus(status);
    return node_error(node, ORT_INVALID_GRAPH, "attribute '%s' is missing or no integer; " DAMAGED, name);
}

static OrtStatus *check_attributes(Node *node, const OrtKernelInfo *info) {
    const Kernel *kernel = node->kernel;
    const struct {
        const char *name;
        int64_t expected;
    } attributes[] = {
        {"in_features", kernel->in_features},
        {"out_features", kernel->out_features},
        {"block_rows", kernel->block_rows},
        {"block_cols", kernel->block_cols},
    };
    for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++) {
        int64_t value;
        TRY(read_attribute(node, info, attributes[i].name, &value));
        if (value != attributes[i].expected)
            return node_error(node, ORT_INVALID_GRAPH,
                              "attribute '%s' is %" PRId64 ", expected %" PRId64 " of kernel '%s'; " MISMATCH,
                              attributes[i].name, value, attributes[i].expected, kernel->name);
    }
    TRY(read_attribute(node, info, "threads", &node->threads));
    if (node->threads < 1 || node->threads > MAX_THREADS)
        return node_error(node, ORT_INVALID_GRAPH, "attribute 'threads' is %" PRId64 ", expected 1 to %d",
                          node->threads, MAX_THREADS);
    return NULL;
}

/* ---- Checking the weight ---- */

static OrtStatus *check_indptr(const Node *node, int64_t count) {
    const int32_t *indptr = node->indptr;
    int64_t block_rows = node->block_rows;
    if (count != block_rows + 1)
        return node_error(node, ORT_INVALID_GRAPH, "indptr has %" PRId64 " elements, expected %" PRId64 "; " DAMAGED,
                          count, block_rows + 1);
    if (indptr[0] != 0)
        return node_error(node, ORT_INVALID_GRAPH, "indptr[0] is %" PRId32 ", expected 0; " DAMAGED, indptr[0]);
    for (int64_t i = 0; i < block_rows; i++)
        if (indptr[i + 1] < indptr[i])
            return node_error(node, ORT_INVALID_GRAPH,
                              "indptr[%" PRId64 "] is %" PRId32 ", expected at least %" PRId32
                              " as before it; " DAMAGED,
                              i + 1, indptr[i + 1], indptr[i]);
    if (indptr[block_rows] != node->blocks)
        return node_error(node, ORT_INVALID_GRAPH,
                          "indptr ends at %" PRId32 ", expected %" PRId64 ", the number of indices; " DAMAGED,
                          indptr[block_rows], node->blocks);
    return NULL;
}

static OrtStatus *check_indices(const Node *node) {
    int64_t last = node->kernel->in_features - node->kernel->block_cols;
    for (int64_t i = 0; i < node->blocks; i++)
        if (node->indices[i] < 0 || node->indices[i] > last)
            return node_error(node, ORT_INVALID_GRAPH,
                              "indices[%" PRId64 "] is %" PRId32 ", expected 0 to %" PRId64 "; " DAMAGED, i,
                              node->indices[i], last);
    /* Codes of X are packed four to a word. */
    for (int64_t i = 0; i < node->blocks && node->kernel->integers; i++)
        if (node->indices[i] % 4)
            return node_error(node, ORT_INVALID_GRAPH,
                              "indices[%" PRId64 "] is %" PRId32 ", expected a multiple of 4; " DAMAGED, i,
                              node->indices[i]);
    return NULL;
}

/* Elements that hold so many values. Codes of 4 bits fill whole units: see `code_unit` in ir/sparse_matrix.py. */
static int64_t stored_count(const Kernel *kernel, int64_t values) {
    return kernel->value_bits == 4 ? values / 2 + values % 2 : values;
}

static OrtStatus *read_shared(const Node *node, const OrtKernelInfo *info, size_t input, OrtTensorType type,
                              int64_t expected, const void **data) {
    Tensor tensor;
    TRY(read_constant(node, info, input, type, &tensor));
    int64_t count = shape_count(&tensor.shape, tensor.shape.rank);
    if (count != expected)
        return node_error(node, ORT_INVALID_GRAPH, "%s has %" PRId64 " elements, expected %" PRId64 "; " DAMAGED,
                          input_names[input], count, expected);
    *data = tensor.data;
    return NULL;
}

/* What values share: a table, and for products of integers the sum of each output's codes. */
static OrtStatus *check_table(Node *node, const OrtKernelInfo *info) {
    const Kernel *kernel = node->kernel;
    const void *data = NULL;
    if (kernel->table_count) {
        TRY(read_shared(node, info, INPUT_TABLE, ORT_TENSOR_FLOAT, kernel->table_count, &data));
        node->table = data;
    }
    if (kernel->integers) {
        TRY(read_shared(node, info, INPUT_SUMS, ORT_TENSOR_INT32, kernel->out_features, &data));
        node->sums = data;
    }
    return NULL;
}

static OrtStatus *read_float(const Node *node, const OrtKernelInfo *info, const char *name, float *value) {
    OrtStatus *status = node->api->KernelInfoGetAttribute_float(info, name, value);
    if (!status)
        return NULL;
    node->api->ReleaseStatus(status);
    return node_error(node, ORT_INVALID_GRAPH, "attribute '%s' is missing or no float; " DAMAGED, name);
}

/* The scale and zero point of X or of Y, by the names of their attributes. */
static OrtStatus *read_scale(const Node *node, const OrtKernelInfo *info, const char *scale_name,
                             const char *zero_point_name, float *scale, float *zero_point) {
    int64_t code;
    TRY(read_float(node, info, scale_name, scale));
    TRY(read_attribute(node, info, zero_point_name, &code));
    if (!(*scale >= FLT_MIN && *scale <= FLT_MAX))
        return node_error(node, ORT_INVALID_GRAPH, "attribute '%s' is %g, expected a positive finite number; " DAMAGED,
                          scale_name, (double)*scale);
    if (code < 0 || code > UINT8_MAX)
        return node_error(node, ORT_INVALID_GRAPH, "attribute '%s' is %" PRId64 ", expected 0 to %d; " DAMAGED,
                          zero_point_name, code, UINT8_MAX);
    *zero_point = (float)code;
    return NULL;
}

static OrtStatus *check_scales(Node *node, const OrtKernelInfo *info) {
    float *parameters = node->parameters, scale;
    if (node->kernel->x_scaled) {
        TRY(read_scale(node, info, "x_scale", "x_zero_point", &scale, &parameters[2]));
        parameters[0] = scale;
        parameters[1] = 1.0f / scale;
    }
    if (node->kernel->y_type == ORT_TENSOR_UINT8) {
        TRY(read_scale(node, info, "y_scale", "y_zero_point", &scale, &parameters[4]));
        parameters[3] = 1.0f / scale;
    }
    return NULL;
}

static OrtStatus *check_weight(Node *node, const OrtKernelInfo *info) {
    const Kernel *kernel = node->kernel;
    Tensor values, indices, indptr;
    TRY(read_constant(node, info, INPUT_VALUES, kernel->value_type, &values));
    TRY(read_constant(node, info, INPUT_INDICES, ORT_TENSOR_INT32, &indices));
    TRY(read_constant(node, info, INPUT_INDPTR, ORT_TENSOR_INT32, &indptr));
    node->values = values.data;
    node->indices = indices.data;
    node->indptr = indptr.data;
    node->block_rows = ceil_div(kernel->out_features, kernel->block_rows);
    node->blocks = shape_count(&indices.shape, indices.shape.rank);

    int64_t count = shape_count(&values.shape, values.shape.rank);
    int64_t block = ceil_div(kernel->block_rows, kernel->panel) * kernel->panel * kernel->block_cols;
    /* A product of sizes from the model could overflow. */
    bool fits = !__builtin_mul_overflow(node->blocks, block, &node->multiply_adds);
    if (!fits || count != stored_count(kernel, node->multiply_adds))
        return node_error(node, ORT_INVALID_GRAPH,
                          "values has %" PRId64 " elements, expected %" PRId64 " blocks of %" PRId64
                          " weights of %" PRId64 " bits; " DAMAGED,
                          count, node->blocks, block, kernel->value_bits);
    TRY(check_table(node, info));
    TRY(check_indptr(node, shape_count(&indptr.shape, indptr.shape.rank)));
    return check_indices(node);
}

/* ---- Checking the epilogue ---- */

static OrtStatus *check_presence(const Node *node, size_t input, bool given, bool expected) {
    if (given == expected)
        return NULL;
    return node_error(node, ORT_INVALID_GRAPH,
                      "%s is %s, but kernel '%s' was compiled %s it; the model and the library come from different "
                      "compilations",
                      input_names[input], given ? "given" : "missing", node->kernel->name, given ? "without" : "for");
}

static OrtStatus *check_epilogue(Node *node, const OrtKernelInfo *info) {
    const Kernel *kernel = node->kernel;
    bool given;
    TRY(is_given(node, info, INPUT_RESIDUAL, &given));
    TRY(check_presence(node, INPUT_RESIDUAL, given, kernel->has_residual));

    Tensor bias;
    int64_t count = 0;
    TRY(is_given(node, info, INPUT_BIAS, &given));
    if (given) {
        TRY(read_constant(node, info, INPUT_BIAS, kernel->type, &bias));
        count = shape_count(&bias.shape, bias.shape.rank);
    }
    /* An empty bias stands for none, too. */
    TRY(check_presence(node, INPUT_BIAS, count > 0, kernel->has_bias));
    if (count > 0 && count != kernel->out_features)
        return node_error(node, ORT_INVALID_GRAPH, "bias has %" PRId64 " elements, expected %" PRId64 "; " DAMAGED,
                          count, kernel->out_features);
    node->bias = count > 0 ? bias.data : NULL;
    return NULL;
}

OrtStatus *node_check(Node *node, const OrtKernelInfo *info) {
    TRY(check_attributes(node, info));
    TRY(check_weight(node, info));
    TRY(check_scales(node, info));
    return check_epilogue(node, info);
}

/* ---- Beginning a run ---- */

/* "[2, 3, 1024]"; cut off where `text` ends. */
static const char *print_shape(const Shape *shape, char text[96]) {
    size_t used = 0, size = 96;
    for (size_t i = 0; i < shape->rank && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, "%s%" PRId64, i ? ", " : "[", shape->dims[i]);
    if (used < size)
        snprintf(text + used, size - used, shape->rank ? "]" : "[]");
    return text;
}

static OrtStatus *read_x(const Node *node, const OrtKernelContext *context, Run *run) {
    const Kernel *kernel = node->kernel;
    const OrtValue *value = NULL;
    TRY(node->api->KernelContext_GetInput(context, INPUT_X, &value));
    TRY(read_tensor(node, INPUT_X, value, kernel->x_type, &run->x));
    const Shape *shape = &run->x.shape;
    if (shape->rank < 1 || shape->dims[shape->rank - 1] != kernel->in_features) {
        char text[96];
        return node_error(node, ORT_INVALID_ARGUMENT, "X has shape %s, expected [..., %" PRId64 "]",
                          print_shape(shape, text), kernel->in_features);
    }
    run->rows = shape_count(shape, shape->rank - 1);
    run->product = *shape;
    run->product.dims[shape->rank - 1] = kernel->out_features;
    return NULL;
}

static OrtStatus *read_residual(const Node *node, const OrtKernelContext *context, Run *run) {
    const Shape *product = &run->product, *residual = &run->residual.shape;
    TRY(node->api->KernelContext_GetInput(context, INPUT_RESIDUAL, &run->residual_value));
    TRY(read_tensor(node, INPUT_RESIDUAL, run->residual_value, node->kernel->type, &run->residual));
    if (!shape_broadcast(product, residual, &run->sum)) {
        char left[96], right[96];
        return node_error(node, ORT_INVALID_ARGUMENT,
                          "residual has shape %s, expected one that broadcasts with the product's %s",
                          print_shape(residual, left), print_shape(product, right));
    }
    /* Of equal size and broadcastable: the elements of all three lie in the same order. */
    int64_t size = shape_count(&run->sum, run->sum.rank);
    run->broadcasts = shape_count(product, product->rank) != size || shape_count(residual, residual->rank) != size;
    return NULL;
}

OrtStatus *node_begin(const Node *node, OrtKernelContext *context, Run *run) {
    TRY(read_x(node, context, run));
    run->sum = run->product;
    run->residual.data = NULL;
    run->broadcasts = false;
    if (node->kernel->has_residual)
        TRY(read_residual(node, context, run));
    TRY(node->api->KernelContext_GetOutput(context, 0, run->sum.dims, run->sum.rank, &run->y_value));
    return node->api->GetTensorMutableData(run->y_value, &run->y);
}
