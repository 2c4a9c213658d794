/* A node of the CPU provider: split the work into calls of the compiled function, and run them on ONNX Runtime's
 * threads. */
#include "sparse_linear.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Multiply-adds that each thread must get for it to be worth waking. Handing work to a waiting thread costs 0.6 us; on
 * an AVX-512 core of 2.5 GHz, halving the work gains as much from 26,000 (one row) to 55,000 (many) multiply-adds on.
 */
#define THREAD_MULTIPLY_ADDS 16384
/* As many of 8-bit integers take the time of one. */
#define INTEGERS 4

/* What a panel costs beside its multiply-adds, in inputs of one block: about 2 for the bias and the stores, and up to
 * 20 with the dearest activations. The shares of a run differ little for any value in between. */
#define PANEL_COST 8

/*
 * Scratch buffers of one size, taken and given back without locks. Each slot is NULL or owns a free buffer, so a buffer
 * has one owner at any time. Above POOL_SLOTS tasks at once, the buffers that find no slot are freed.
 */
enum { POOL_SLOTS = 128 };

typedef struct {
    size_t bytes;
    _Atomic(void *) slots[POOL_SLOTS];
} Pool;

/* Only the pool changes while it runs. */
typedef struct {
    Node node;
    /* Panels that hold at least one output, and the work of all panels before each: [panels + 1]. */
    int64_t panels;
    int64_t *work;
    Pool pool;
} CpuNode;

/* The arguments of a compiled function, in order. */
enum {
    ARG_X,
    ARG_VALUES,
    ARG_INDICES,
    ARG_INDPTR,
    ARG_TABLE,
    ARG_SUMS,
    ARG_BIAS,
    ARG_RESIDUAL,
    ARG_Y,
    ARG_WORKSPACE,
    ARG_PARAMETERS,
    ARG_ROW_BEGIN,
    ARG_ROW_END,
    ARG_PANEL_BEGIN,
    ARG_PANEL_END,
    ARG_COUNT
};

/* One product of X and the weight: `row_parts` runs of rows, each in `panel_parts` runs of panels. */
typedef struct {
    CpuNode *node;
    const CpuVariant *variant;
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
static int64_t first_panel(const CpuNode *node, int64_t part, int64_t parts) {
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
    CpuNode *node = job->node;
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
    const Node *node = &job->node->node;
    int64_t work = node->multiply_adds / (node->kernel->integers ? INTEGERS : 1) + node->kernel->out_features;
    int64_t threads = job->rows * work / THREAD_MULTIPLY_ADDS;
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
static OrtStatus *multiply(CpuNode *cpu, const OrtKernelContext *context, const void *x, const void *residual, void *y,
                           int64_t rows) {
    if (rows == 0)
        return NULL;
    const Node *node = &cpu->node;
    Job job = {
        .node = cpu,
        .variant = node->kernel->cpu,
        .rows = rows,
        .arguments =
            {
                [ARG_X] = tvm_pointer(x),
                [ARG_VALUES] = tvm_pointer(node->values),
                [ARG_INDICES] = tvm_pointer(node->indices),
                [ARG_INDPTR] = tvm_pointer(node->indptr),
                [ARG_TABLE] = tvm_pointer(node->table),
                [ARG_SUMS] = tvm_pointer(node->sums),
                [ARG_BIAS] = tvm_pointer(node->bias),
                [ARG_RESIDUAL] = tvm_pointer(residual),
                [ARG_Y] = tvm_pointer(y),
                [ARG_WORKSPACE] = tvm_pointer(NULL),
                [ARG_PARAMETERS] = tvm_pointer(node->parameters),
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
static OrtStatus *multiply_broadcast(CpuNode *cpu, const OrtKernelContext *context, const Run *run) {
    int64_t size = shape_count(&run->product, run->product.rank);
    float *scratch = malloc((size_t)size * sizeof *scratch);
    if (!scratch)
        return node_error(&cpu->node, ORT_FAIL, "out of memory for a residual of %" PRId64 " elements", size);
    OrtStatus *status;
    if (shape_count(&run->sum, run->sum.rank) == size) {
        tensor_add(&run->sum, &run->residual, &no_tensor, scratch);
        status = multiply(cpu, context, run->x.data, scratch, run->y, run->rows);
    } else {
        tensor_add(&run->product, &no_tensor, &no_tensor, run->y);
        status = multiply(cpu, context, run->x.data, run->y, scratch, run->rows);
        const Tensor expanded = {.type = ORT_TENSOR_FLOAT, .shape = run->product, .data = scratch};
        if (!status)
            tensor_add(&run->sum, &expanded, &run->residual, run->y);
    }
    free(scratch);
    return status;
}

OrtStatus *cpu_compute(void *data, OrtKernelContext *context) {
    CpuNode *cpu = data;
    Run run;
    TRY(node_begin(&cpu->node, context, &run));
    if (shape_count(&run.sum, run.sum.rank) == 0)
        return NULL;
    if (run.broadcasts)
        return multiply_broadcast(cpu, context, &run);
    return multiply(cpu, context, run.x.data, run.residual.data, run.y, run.rows);
}

/* ---- Creation ---- */

static OrtStatus *plan_work(CpuNode *cpu) {
    const Kernel *kernel = cpu->node.kernel;
    int64_t per_row = (kernel->block_rows + kernel->panel - 1) / kernel->panel;
    int64_t block_rows = cpu->node.block_rows;
    int64_t last_outputs = kernel->out_features - (block_rows - 1) * kernel->block_rows;
    cpu->panels = (block_rows - 1) * per_row + (last_outputs + kernel->panel - 1) / kernel->panel;
    cpu->work = malloc((size_t)(cpu->panels + 1) * sizeof *cpu->work);
    if (!cpu->work)
        return node_error(&cpu->node, ORT_FAIL, "out of memory for %" PRId64 " panels", cpu->panels);
    cpu->work[0] = 0;
    for (int64_t panel = 0; panel < cpu->panels; panel++) {
        const int32_t *row = cpu->node.indptr + panel / per_row;
        int64_t inputs = (row[1] - row[0]) * kernel->block_cols;
        cpu->work[panel + 1] = cpu->work[panel] + inputs + PANEL_COST;
    }
    return NULL;
}

static void prepare_pool(CpuNode *cpu) {
    int64_t largest = 0;
    for (const CpuVariant *variant = cpu->node.kernel->cpu;; variant++) {
        if (variant->workspace > largest)
            largest = variant->workspace;
        if (variant->max_rows == INT64_MAX)
            break;
    }
    /* aligned_alloc wants a multiple of the alignment. */
    cpu->pool.bytes = (size_t)((largest * (int64_t)sizeof(float) + 63) / 64) * 64;
}

static OrtStatus *prepare(CpuNode *cpu, const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info) {
    Node *node = &cpu->node;
    TRY(node_find(node, api, info));
    /* Before the checks: ONNX Runtime may have put casts around a node of 16 bits that it has to run here. */
    if (!node->kernel->cpu)
        return node_error(node, ORT_NOT_IMPLEMENTED,
                          "%s weights need ONNX Runtime's CUDA provider; this session runs on the CPU: open it with "
                          "CUDAExecutionProvider, which onnxruntime-gpu has",
                          type_name(node->kernel->type));
    /* X, the weight and the bias are checked where they are read. */
    if (op_y_type(op) != node->kernel->y_type)
        return node_error(node, ORT_INVALID_GRAPH,
                          "the node's result is %s, expected %s of kernel '%s'; the model and the library come from "
                          "different compilations",
                          type_name(op_y_type(op)), type_name(node->kernel->y_type), node->kernel->name);
    TRY(node_check(node, info));
    prepare_pool(cpu);
    return plan_work(cpu);
}

OrtStatus *cpu_create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **result) {
    CpuNode *cpu = calloc(1, sizeof *cpu);
    if (!cpu)
        return api->CreateStatus(ORT_FAIL, "SparseLinear: out of memory");
    for (size_t i = 0; i < POOL_SLOTS; i++)
        atomic_init(&cpu->pool.slots[i], NULL);
    OrtStatus *status = prepare(cpu, op, api, info);
    if (status) {
        cpu_destroy(cpu);
        return status;
    }
    *result = cpu;
    return NULL;
}

void cpu_destroy(void *data) {
    CpuNode *cpu = data;
    for (size_t i = 0; i < POOL_SLOTS; i++)
        free(atomic_load(&cpu->pool.slots[i]));
    free(cpu->work);
    free(cpu);
}
