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
enum {
    INPUT_X,
    INPUT_VALUES,
    INPUT_INDICES,
    INPUT_INDPTR,
    INPUT_BIAS,
    INPUT_RESIDUAL,
    INPUT_TABLE,
    INPUT_SUMS,
    INPUT_COUNT
};
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

/* One compiled schedule for CPUs; the fields are those of `CpuVariant` in codegen/kernel.py. */
typedef struct {
    TvmFunction *run;
    int64_t max_rows;
    int64_t row_grain;
    int64_t workspace;
    int64_t parts_per_thread;
} CpuVariant;

/* What a CUDA kernel may take: `CUDA_ARGUMENTS` in codegen/kernel.py, in its order. */
enum {
    CUDA_X,
    CUDA_VALUES,
    CUDA_INDICES,
    CUDA_INDPTR,
    CUDA_ORDER,
    CUDA_BIAS,
    CUDA_RESIDUAL,
    CUDA_Y,
    CUDA_WORKSPACE,
    CUDA_ROWS,
    CUDA_ARGUMENT_COUNT
};

/* One launch of a device function; the fields are those of `Launch` in codegen/kernel.py. */
typedef struct {
    const char *entry;
    int argument_count;
    unsigned char arguments[CUDA_ARGUMENT_COUNT];
    int64_t units;
    int64_t tile_rows;
    unsigned threads;
    unsigned shared_bytes;
    int64_t blocks_per_sm;
} Launch;

enum { MAX_LAUNCHES = 4 };

/* One compiled schedule for GPUs; the fields are those of `CudaVariant` in codegen/kernel.py. */
typedef struct {
    const char *arch;
    /* 10 * major + minor. */
    int capability;
    /* "sm_90a": for this compute capability alone. */
    bool exact;
    /* "compute_90": for the driver to compile. */
    bool ptx;
    int64_t max_rows;
    int64_t workspace;
    const void *image;
    int launch_count;
    Launch launches[MAX_LAUNCHES];
} CudaVariant;

/* One kernel; the fields are those of `Kernel` in codegen/kernel.py. */
typedef struct {
    const char *name;
    int64_t in_features;
    int64_t out_features;
    int64_t block_rows;
    int64_t block_cols;
    int64_t panel;
    /* Of bias and residual; of X; of the values; of Y. */
    OrtTensorType type;
    OrtTensorType x_type;
    OrtTensorType value_type;
    OrtTensorType y_type;
    /* Bits of a value: 4 where two stand in a byte. */
    int64_t value_bits;
    /* Elements of the table that the values share, scales or a codebook; 0 for none. */
    int64_t table_count;
    /* Products of 8-bit integers, for which X is given with a scale, or gets one, by its rows or from the model. */
    bool integers;
    bool x_scaled;
    bool has_bias;
    bool has_residual;
    /* By rising `max_rows`; the last is for any number of rows. NULL where there are none. */
    const CpuVariant *cpu;
    /* One architecture after another, each like `cpu`; ends with one whose arch is NULL. NULL where there are none. */
    const CudaVariant *cuda;
} Kernel;

/* Ends with a kernel whose name is NULL. Either all kernels have variants for GPUs or none has: ONNX Runtime gives a
 * node to a provider by its types alone. */
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

HIDDEN const char *type_name(OrtTensorType type);

/* The elements of a tensor with the first `rank` dimensions of `shape`. */
HIDDEN int64_t shape_count(const Shape *shape, size_t rank);

/* Whether two tensors broadcast, by the rules of ONNX, and to which shape. */
HIDDEN bool shape_broadcast(const Shape *a, const Shape *b, Shape *result);

/* out = a + b, both float32 and broadcast to `shape`, the shape of `out`. */
HIDDEN void tensor_add(const Shape *shape, const Tensor *a, const Tensor *b, float *out);

/* ---- One node of a model ---- */

/* What a node's creation learned and checked, whatever provider it runs on. */
typedef struct {
    const OrtApi *api;
    const Kernel *kernel;
    /* The node's name or, where it has none or a very long one, the kernel's. */
    char name[256];
    int64_t threads;
    /* The weight and bias as ONNX Runtime holds them: values and bias where the provider computes, the rest on the
     * host. */
    const void *values;
    const int32_t *indices;
    const int32_t *indptr;
    const float *table;
    const int32_t *sums;
    const void *bias;
    /* Scale, its inverse and zero point of X; inverse of the scale and zero point of Y. */
    float parameters[5];
    int64_t block_rows;
    int64_t blocks;
    /* Multiply-adds a row of X, padding included. */
    int64_t multiply_adds;
} Node;

/* The first and the second half of a creation: find the kernel that a node names; check all that it runs with. */
HIDDEN OrtStatus *node_find(Node *node, const OrtApi *api, const OrtKernelInfo *info);
/* The type of Y of the operator that a node is. */
HIDDEN OrtTensorType op_y_type(const OrtCustomOp *op);
HIDDEN OrtStatus *node_check(Node *node, const OrtKernelInfo *info);

/* A status with one sentence that begins with the node's name. */
HIDDEN __attribute__((format(printf, 3, 4))) OrtStatus *node_error(const Node *node, OrtErrorCode code,
                                                                   const char *format, ...);

/* What one run works on. */
typedef struct {
    Tensor x;
    /* The shape of X times the weight, and its number of rows. */
    Shape product;
    int64_t rows;
    /* Where the kernel has one. */
    const OrtValue *residual_value;
    Tensor residual;
    /* Whether adding the residual moves or repeats elements, of it or of the product. */
    bool broadcasts;
    OrtValue *y_value;
    Shape sum;
    void *y;
} Run;

/* Read and check the inputs, and create the output. */
HIDDEN OrtStatus *node_begin(const Node *node, OrtKernelContext *context, Run *run);

/* The providers' nodes, as OrtCustomOp wants them. */
HIDDEN OrtStatus *cpu_create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **node);
HIDDEN OrtStatus *cpu_compute(void *node, OrtKernelContext *context);
HIDDEN void cpu_destroy(void *node);

HIDDEN OrtStatus *cuda_create(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **node);
HIDDEN OrtStatus *cuda_compute(void *node, OrtKernelContext *context);
HIDDEN void cuda_destroy(void *node);

#endif
