/* What the files of the operator share; `table.c`, which is generated for each library, defines the table. */
#ifndef SPARSEC_SPARSE_LINEAR_H
#define SPARSEC_SPARSE_LINEAR_H

#include "ort_api.h"

#include <stdatomic.h>
#include <stdbool.h>

#define HIDDEN __attribute__((visibility("hidden")))

/* Leaves the calling function with the status of `call` unless it is success. */
#define TRY(call) \
    do { \
        OrtStatus *status_ = (call); \
        if (status_) \
            return status_; \
    } while (0)

/* The operator's inputs, by position. */
enum { INPUT_X, INPUT_VALUES, INPUT_INDICES, INPUT_INDPTR, INPUT_BIAS, INPUT_RESIDUAL, INPUT_COUNT };
HIDDEN extern const char *const input_names[INPUT_COUNT];

/* ---- The table of kernels ---- */

/* TVM's calling convention for compiled functions: tagged values of 16 bytes. */
typedef struct {
    int32_t type;
    uint32_t padding;
    union {
        int64_t integer;
        void *pointer;
    } as;
} TvmValue;

enum { TVM_INTEGER = 1, TVM_POINTER = 4 };

typedef int TvmFunction(void *self, const TvmValue *arguments, int32_t count, TvmValue *result);

/* One compiled schedule; the fields are those of `Variant` in codegen/kernel.py. */
typedef struct {
    TvmFunction *run;
    int64_t max_rows;
    int64_t row_grain;
    int64_t workspace;
    int64_t parts_per_thread;
} Variant;

/* One kernel; the fields are those of `Kernel` in codegen/kernel.py. */
typedef struct {
    const char *name;
    int64_t in_features;
    int64_t out_features;
    int64_t block_rows;
    int64_t block_cols;
    int64_t panel;
    bool has_bias;
    bool has_residual;
    /* By rising `max_rows`; the last is for any number of rows. */
    const Variant *variants;
} Kernel;

/* Ends with a kernel whose name is NULL. */
HIDDEN extern const Kernel sparsec_kernels[];

/* The first instruction set that the kernels need and this processor lacks, or NULL. */
HIDDEN const char *sparsec_missing_instructions(void);

/* The text of the error that a kernel raised last in this thread. */
HIDDEN const char *tvm_last_error(void);

/* ---- Tensors ---- */

enum { MAX_RANK = 32 };

typedef struct {
    size_t rank;
    int64_t dims[MAX_RANK];
} Shape;

typedef struct {
    OrtTensorType type;
    Shape shape;
    void *data;
} Tensor;

/* The elements of a tensor with the first `rank` dimensions of `shape`. */
HIDDEN int64_t shape_count(const Shape *shape, size_t rank);

/* Whether two tensors broadcast, by the rules of ONNX, and to which shape. */
HIDDEN bool shape_broadcast(const Shape *a, const Shape *b, Shape *result);

/* out = a + b, both broadcast to `shape`, the shape of `out`. */
HIDDEN void tensor_add(const Shape *shape, const Tensor *a, const Tensor *b, float *out);

/* ---- One node of a model ---- */

/*
 * Scratch buffers of one size, taken and given back without locks. Each slot is NULL or owns a free buffer, so a buffer
 * has one owner at any time. Above POOL_SLOTS tasks at once, the buffers that find no slot are freed.
 */
enum { POOL_SLOTS = 128 };

typedef struct {
    size_t bytes;
    _Atomic(void *) slots[POOL_SLOTS];
} Pool;

/* What a node's creation learned and checked; only the pool changes while it runs. */
typedef struct {
    const OrtApi *api;
    const Kernel *kernel;
    /* The node's name or, where it has none or a very long one, the kernel's. */
    char name[256];
    int64_t threads;
    const float *values;
    const int32_t *indices;
    const int32_t *indptr;
    const float *bias;
    /* Multiply-adds a row of X, padding included: the number of values. */
    int64_t multiply_adds;
    /* Panels that hold at least one output, and the work of all panels before each: [panels + 1]. */
    int64_t panels;
    int64_t *work;
    Pool pool;
} Node;

HIDDEN OrtStatus *node_create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **node);
HIDDEN OrtStatus *node_compute(void *node, OrtKernelContext *context);
HIDDEN void node_destroy(void *node);

/* A status with one sentence that begins with the node's name. */
HIDDEN __attribute__((format(printf, 3, 4))) OrtStatus *node_error(const Node *node, OrtErrorCode code,
                                                                   const char *format, ...);

/* Describe input number `input`; its status is an error where the input is missing or has more than MAX_RANK
 * dimensions. */
HIDDEN OrtStatus *node_read(const Node *node, size_t input, const OrtValue *value, Tensor *tensor);

#endif
