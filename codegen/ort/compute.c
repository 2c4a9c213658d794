/* Running a node: split the work into calls of the compiled function, and run them on ONNX Runtime's threads. */
#include "sparse_linear.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Multiply-adds that each thread must get for it to be worth waking. Handing work to a waiting thread costs 0.6 us; on
 * an AVX-512 core of 2.5 GHz, halving the work gains as much from 26,000 (one row) to 55,000 (many) multiply-adds on.
 */
#define THREAD_MULTIPLY_ADDS 16384

/* The arguments of a compiled function, in order. */
enum {
    ARG_X,
    ARG_VALUES,
    ARG_INDICES,
    ARG_INDPTR,
    ARG_BIAS,
    ARG_RESIDUAL,
    ARG_Y,
    ARG_WORKSPACE,
    ARG_ROW_BEGIN,
    ARG_ROW_END,
    ARG_PANEL_BEGIN,
    ARG_PANEL_END,
    ARG_COUNT
};

/* One product of X and the weight: `row_parts` runs of rows, each in `panel_parts` runs of panels. */
typedef struct {
    Node *node;
    const Variant *variant;
    TvmValue arguments[ARG_COUNT];
    int64_t rows;
    int64_t tiles;
    int64_t row_parts;
    int64_t panel_parts;
    /* Set by the first task that fails, which then writes `error`. */
    atomic_bool failed;
    char error[256];
} Job;

/* ---- Scratch memory ---- */

static void *pool_take(Pool *pool) {
    for (size_t i = 0; i < POOL_SLOTS; i++) {
        void *buffer = atomic_load_explicit(&pool->slots[i], memory_order_relaxed);
        if (buffer && (buffer = atomic_exchange_explicit(&pool->slots[i], NULL, memory_order_acquire)))
            return buffer;
    }
    return aligned_alloc(64, pool->bytes);
}

static void pool_give(Pool *pool, void *buffer) {
    for (size_t i = 0; i < POOL_SLOTS; i++) {
        void *empty = NULL;
        if (atomic_compare_exchange_strong_explicit(&pool->slots[i], &empty, buffer, memory_order_release,
                                                    memory_order_relaxed))
            return;
    }
    free(buffer);
}

/* ---- One part of the work ---- */

static TvmValue tvm_pointer(const void *pointer) {
    return (TvmValue){.type = TVM_POINTER, .as.pointer = (void *)pointer};
}

static TvmValue tvm_integer(int64_t integer) { return (TvmValue){.type = TVM_INTEGER, .as.integer = integer}; }

static void job_fail(Job *job, const char *error) {
    if (!atomic_exchange(&job->failed, true))
        snprintf(job->error, sizeof job->error, "%s", error);
}

/* Where `part` of `parts` equal shares of the work begins: the nearest start of a panel. */
static int64_t first_panel(const Node *node, int64_t part, int64_t parts) {
    int64_t total = node->work[node->panels];
    /* total * part / parts, without the large product. */
    int64_t target = total / parts * part + total % parts * part / parts;
    int64_t low = 0, high = node->panels;
    while (low < high) {
        int64_t middle = low + (high - low) / 2;
        if (node->work[middle] < target)
            low = middle + 1;
        else
            high = middle;
    }
    if (low > 0 && target - node->work[low - 1] < node->work[low] - target)
        low--;
    return low;
}

static void job_call(Job *job, const TvmValue *arguments) {
    TvmValue result = {0};
    if (job->variant->run(NULL, arguments, ARG_COUNT, &result))
        job_fail(job, tvm_last_error());
}

static void job_part(void *data, size_t index) {
    Job *job = data;
    Node *node = job->node;
    int64_t row_part = (int64_t)index / job->panel_parts, panel_part = (int64_t)index % job->panel_parts;
    int64_t row_begin = row_part * job->tiles / job->row_parts * job->variant->row_grain;
    int64_t row_end = (row_part + 1) * job->tiles / job->row_parts * job->variant->row_grain;
    int64_t panel_begin = first_panel(node, panel_part, job->panel_parts);
    int64_t panel_end = first_panel(node, panel_part + 1, job->panel_parts);
    if (panel_begin == panel_end || atomic_load_explicit(&job->failed, memory_order_relaxed))
        return;

    TvmValue arguments[ARG_COUNT];
    memcpy(arguments, job->arguments, sizeof arguments);
    arguments[ARG_ROW_BEGIN] = tvm_integer(row_begin);
    arguments[ARG_ROW_END] = tvm_integer(row_end < job->rows ? row_end : job->rows);
    arguments[ARG_PANEL_BEGIN] = tvm_integer(panel_begin);
    arguments[ARG_PANEL_END] = tvm_integer(panel_end);
    if (!job->variant->workspace) {
        job_call(job, arguments);
        return;
    }
    void *workspace = pool_take(&node->pool);
    if (!workspace) {
        job_fail(job, "out of memory for its workspace");
        return;
    }
    arguments[ARG_WORKSPACE] = tvm_pointer(workspace);
    job_call(job, arguments);
    pool_give(&node->pool, workspace);
}

/* ---- The whole product ---- */

static int64_t part_count(const Job *job) {
    const Node *node = job->node;
    int64_t threads = job->rows * (node->multiply_adds + node->kernel->out_features) / THREAD_MULTIPLY_ADDS;
    if (threads > node->threads)
        threads = node->threads;
    return threads > 1 ? threads * job->variant->parts_per_thread : 1;
}

/* Runs of rows alone where there are enough tiles of them, else each tile's panels are split, too. */
static void job_split(Job *job) {
    int64_t parts = part_count(job);
    job->tiles = (job->rows + job->variant->row_grain - 1) / job->variant->row_grain;
    job->row_parts = job->tiles < parts ? job->tiles : parts;
    job->panel_parts = (parts + job->row_parts - 1) / job->row_parts;
    if (job->panel_parts > job->node->panels)
        job->panel_parts = job->node->panels;
}

/* y [rows, N] = activation(x [rows, K] times the weight + bias) + residual [rows, N]. */
static OrtStatus *multiply(Node *node, const OrtKernelContext *context, const float *x, const float *residual, float *y,
                           int64_t rows) {
    if (rows == 0)
        return NULL;
    Job job = {
        .node = node,
        .variant = node->kernel->variants,
        .rows = rows,
        .arguments =
            {
                [ARG_X] = tvm_pointer(x),
                [ARG_VALUES] = tvm_pointer(node->values),
                [ARG_INDICES] = tvm_pointer(node->indices),
                [ARG_INDPTR] = tvm_pointer(node->indptr),
                [ARG_BIAS] = tvm_pointer(node->bias),
                [ARG_RESIDUAL] = tvm_pointer(residual),
                [ARG_Y] = tvm_pointer(y),
                [ARG_WORKSPACE] = tvm_pointer(NULL),
            },
    };
    while (job.variant->max_rows < rows)
        job.variant++;
    job_split(&job);
    size_t parts = (size_t)(job.row_parts * job.panel_parts);
    if (parts == 1)
        job_part(&job, 0);
    else
        TRY(node->api->KernelContext_ParallelFor(context, job_part, parts, 0, &job));
    if (atomic_load(&job.failed))
        return node_error(node, ORT_FAIL, "kernel '%s' failed: %s", node->kernel->name, job.error);
    return NULL;
}

/* The identity of addition: unlike +0, it leaves -0 as it is. */
static float no_residual = -0.0f;
static const Tensor no_tensor = {.type = ORT_TENSOR_FLOAT, .shape = {.rank = 0}, .data = &no_residual};

/*
 * The product plus a residual of another shape. Where the residual is the smaller one, it is expanded first; else the
 * product goes to scratch memory and is expanded into y, which first lends itself as the residual of the product.
 */
static OrtStatus *multiply_broadcast(Node *node, const OrtKernelContext *context, const Tensor *x, const Shape *product,
                                     const Tensor *residual, const Shape *sum, float *y) {
    int64_t size = shape_count(product, product->rank);
    int64_t rows = shape_count(product, product->rank - 1);
    float *scratch = malloc((size_t)size * sizeof *scratch);
    if (!scratch)
        return node_error(node, ORT_FAIL, "out of memory for a residual of %" PRId64 " elements", size);
    OrtStatus *status;
    if (shape_count(sum, sum->rank) == size) {
        tensor_add(sum, residual, &no_tensor, scratch);
        status = multiply(node, context, x->data, scratch, y, rows);
    } else {
        tensor_add(product, &no_tensor, &no_tensor, y);
        status = multiply(node, context, x->data, y, scratch, rows);
        const Tensor expanded = {.type = ORT_TENSOR_FLOAT, .shape = *product, .data = scratch};
        if (!status)
            tensor_add(sum, &expanded, residual, y);
    }
    free(scratch);
    return status;
}

/* ---- One run ---- */

/* "[2, 3, 1024]"; cut off where `text` ends. */
static const char *print_shape(const Shape *shape, char text[96]) {
    size_t used = 0, size = 96;
    for (size_t i = 0; i < shape->rank && used < size; i++)
        used += (size_t)snprintf(text + used, size - used, "%s%" PRId64, i ? ", " : "[", shape->dims[i]);
    if (used < size)
        snprintf(text + used, size - used, shape->rank ? "]" : "[]");
    return text;
}

static OrtStatus *read_input(const Node *node, const OrtKernelContext *context, size_t input, Tensor *tensor) {
    const OrtValue *value = NULL;
    TRY(node->api->KernelContext_GetInput(context, input, &value));
    TRY(node_read(node, input, value, tensor));
    if (tensor->type != ORT_TENSOR_FLOAT)
        return node_error(node, ORT_INVALID_ARGUMENT, "%s has element type %d, expected %d (float32)",
                          input_names[input], (int)tensor->type, (int)ORT_TENSOR_FLOAT);
    return NULL;
}

static OrtStatus *create_output(const Node *node, OrtKernelContext *context, const Shape *shape, void **data) {
    OrtValue *value = NULL;
    TRY(node->api->KernelContext_GetOutput(context, 0, shape->dims, shape->rank, &value));
    return node->api->GetTensorMutableData(value, data);
}

static OrtStatus *compute_with_residual(Node *node, OrtKernelContext *context, const Tensor *x, const Shape *product) {
    Tensor residual;
    Shape sum;
    TRY(read_input(node, context, INPUT_RESIDUAL, &residual));
    if (!shape_broadcast(product, &residual.shape, &sum)) {
        char left[96], right[96];
        return node_error(node, ORT_INVALID_ARGUMENT,
                          "residual has shape %s, expected one that broadcasts with the product's %s",
                          print_shape(&residual.shape, left), print_shape(product, right));
    }
    void *y;
    TRY(create_output(node, context, &sum, &y));
    int64_t size = shape_count(&sum, sum.rank);
    if (size == 0)
        return NULL;
    /* Of equal size and broadcastable: the elements of all three lie in the same order. */
    if (shape_count(product, product->rank) == size && shape_count(&residual.shape, residual.shape.rank) == size)
        return multiply(node, context, x->data, residual.data, y, shape_count(product, product->rank - 1));
    return multiply_broadcast(node, context, x, product, &residual, &sum, y);
}

OrtStatus *node_compute(void *data, OrtKernelContext *context) {
    Node *node = data;
    const Kernel *kernel = node->kernel;
    Tensor x;
    TRY(read_input(node, context, INPUT_X, &x));
    Shape *shape = &x.shape;
    if (shape->rank < 1 || shape->dims[shape->rank - 1] != kernel->in_features) {
        char text[96];
        return node_error(node, ORT_INVALID_ARGUMENT, "X has shape %s, expected [..., %" PRId64 "]",
                          print_shape(shape, text), kernel->in_features);
    }
    /* From here on only the product's shape matters. */
    shape->dims[shape->rank - 1] = kernel->out_features;
    if (kernel->has_residual)
        return compute_with_residual(node, context, &x, shape);
    void *y;
    TRY(create_output(node, context, shape, &y));
    return multiply(node, context, x.data, NULL, y, shape_count(shape, shape->rank - 1));
}
