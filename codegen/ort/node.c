/* Creating a node: everything that can be checked once is checked here, so that a run only multiplies. */
#include "sparse_linear.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Threads that a node may ask for; more than any machine has, few enough that no product of it overflows. */
#define MAX_THREADS 4096

/* What a panel costs beside its multiply-adds, in inputs of one block: about 2 for the bias and the stores, and up to
 * 20 with the dearest activations. The shares of a run differ little for any value in between. */
#define PANEL_COST 8

#define DAMAGED "the model is damaged: compile it again"

const char *const input_names[INPUT_COUNT] = {"X", "values", "indices", "indptr", "bias", "residual"};

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

OrtStatus *node_read(const Node *node, size_t input, const OrtValue *value, Tensor *tensor) {
    const OrtApi *api = node->api;
    if (!value)
        return node_error(node, ORT_INVALID_ARGUMENT, "%s is missing", input_names[input]);
    OrtTensorTypeAndShapeInfo *info;
    TRY(api->GetTensorTypeAndShape(value, &info));
    OrtStatus *status = read_info(node, input, info, tensor);
    api->ReleaseTensorTypeAndShapeInfo(info);
    if (status)
        return status;
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
    TRY(node->api->KernelInfoGetConstantInput_tensor(info, input, &constant, &value));
    if (!constant)
        return node_error(node, ORT_INVALID_GRAPH,
                          "%s is computed or fed, expected an initializer of the node's own graph", input_names[input]);
    TRY(node_read(node, input, value, tensor));
    if (tensor->type != type)
        return node_error(node, ORT_INVALID_GRAPH, "%s has element type %d, expected %d (%s)", input_names[input],
                          (int)tensor->type, (int)type, type == ORT_TENSOR_FLOAT ? "float32" : "int32");
    return NULL;
}

/* ---- Finding the kernel ---- */

static OrtStatus *find_kernel(Node *node, const OrtKernelInfo *info) {
    const OrtApi *api = node->api;
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
                      "this library has no kernel '%s'; the model and the library come from different compilations",
                      name);
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
                              "attribute '%s' is %" PRId64 ", expected %" PRId64 " of kernel '%s'; the model and "
                              "the library come from different compilations",
                              attributes[i].name, value, attributes[i].expected, kernel->name);
    }
    TRY(read_attribute(node, info, "threads", &node->threads));
    if (node->threads < 1 || node->threads > MAX_THREADS)
        return node_error(node, ORT_INVALID_GRAPH, "attribute 'threads' is %" PRId64 ", expected 1 to %d",
                          node->threads, MAX_THREADS);
    return NULL;
}

/* ---- Checking the weight ---- */

static OrtStatus *check_indptr(const Node *node, int64_t count, int64_t blocks) {
    const int32_t *indptr = node->indptr;
    int64_t block_rows = ceil_div(node->kernel->out_features, node->kernel->block_rows);
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
    if (indptr[block_rows] != blocks)
        return node_error(node, ORT_INVALID_GRAPH,
                          "indptr ends at %" PRId32 ", expected %" PRId64 ", the number of indices; " DAMAGED,
                          indptr[block_rows], blocks);
    return NULL;
}

static OrtStatus *check_indices(const Node *node, int64_t blocks) {
    int64_t last = node->kernel->in_features - node->kernel->block_cols;
    for (int64_t i = 0; i < blocks; i++)
        if (node->indices[i] < 0 || node->indices[i] > last)
            return node_error(node, ORT_INVALID_GRAPH,
                              "indices[%" PRId64 "] is %" PRId32 ", expected 0 to %" PRId64 "; " DAMAGED, i,
                              node->indices[i], last);
    return NULL;
}

static OrtStatus *check_weight(Node *node, const OrtKernelInfo *info) {
    const Kernel *kernel = node->kernel;
    Tensor values, indices, indptr;
    TRY(read_constant(node, info, INPUT_VALUES, ORT_TENSOR_FLOAT, &values));
    TRY(read_constant(node, info, INPUT_INDICES, ORT_TENSOR_INT32, &indices));
    TRY(read_constant(node, info, INPUT_INDPTR, ORT_TENSOR_INT32, &indptr));
    node->values = values.data;
    node->indices = indices.data;
    node->indptr = indptr.data;
    node->multiply_adds = shape_count(&values.shape, values.shape.rank);

    int64_t blocks = shape_count(&indices.shape, indices.shape.rank);
    int64_t block = ceil_div(kernel->block_rows, kernel->panel) * kernel->panel * kernel->block_cols;
    /* Divided, not multiplied: a product of sizes from the model could overflow. */
    if (node->multiply_adds % block || node->multiply_adds / block != blocks)
        return node_error(node, ORT_INVALID_GRAPH,
                          "values has %" PRId64 " elements, expected %" PRId64 " blocks of %" PRId64 "; " DAMAGED,
                          node->multiply_adds, blocks, block);
    TRY(check_indptr(node, shape_count(&indptr.shape, indptr.shape.rank), blocks));
    return check_indices(node, blocks);
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
        TRY(read_constant(node, info, INPUT_BIAS, ORT_TENSOR_FLOAT, &bias));
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

/* ---- Preparing to run ---- */

static OrtStatus *plan_work(Node *node) {
    const Kernel *kernel = node->kernel;
    int64_t per_row = ceil_div(kernel->block_rows, kernel->panel);
    int64_t block_rows = ceil_div(kernel->out_features, kernel->block_rows);
    int64_t last_outputs = kernel->out_features - (block_rows - 1) * kernel->block_rows;
    node->panels = (block_rows - 1) * per_row + ceil_div(last_outputs, kernel->panel);
    node->work = malloc((size_t)(node->panels + 1) * sizeof *node->work);
    if (!node->work)
        return node_error(node, ORT_FAIL, "out of memory for %" PRId64 " panels", node->panels);
    node->work[0] = 0;
    for (int64_t panel = 0; panel < node->panels; panel++) {
        const int32_t *row = node->indptr + panel / per_row;
        int64_t inputs = (row[1] - row[0]) * kernel->block_cols;
        node->work[panel + 1] = node->work[panel] + inputs + PANEL_COST;
    }
    return NULL;
}

static void prepare_pool(Node *node) {
    int64_t largest = 0;
    for (const Variant *variant = node->kernel->variants;; variant++) {
        if (variant->workspace > largest)
            largest = variant->workspace;
        if (variant->max_rows == INT64_MAX)
            break;
    }
    /* aligned_alloc wants a multiple of the alignment. */
    node->pool.bytes = (size_t)ceil_div(largest * (int64_t)sizeof(float), 64) * 64;
}

static OrtStatus *prepare(Node *node, const OrtKernelInfo *info) {
    TRY(find_kernel(node, info));
    TRY(check_attributes(node, info));
    TRY(check_weight(node, info));
    TRY(check_epilogue(node, info));
    prepare_pool(node);
    return plan_work(node);
}

OrtStatus *node_create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **result) {
    (void)op;
    Node *node = calloc(1, sizeof *node);
    if (!node)
        return api->CreateStatus(ORT_FAIL, "SparseLinear: out of memory");
    node->api = api;
    for (size_t i = 0; i < POOL_SLOTS; i++)
        atomic_init(&node->pool.slots[i], NULL);
    OrtStatus *status = prepare(node, info);
    if (status) {
        node_destroy(node);
        return status;
    }
    *result = node;
    return NULL;
}

void node_destroy(void *data) {
    Node *node = data;
    for (size_t i = 0; i < POOL_SLOTS; i++)
        free(atomic_load(&node->pool.slots[i]));
    free(node->work);
    free(node);
}
