/*
 * The part of ONNX Runtime's C ABI that the operator uses, in our own words.
 *
 * OrtApi is a table of function pointers that only ever grows at its end, so a slot number is a contract; the gaps are
 * functions that we do not call, and the assertions below pin each slot. The names are ONNX Runtime's, whose
 * documentation therefore applies. Functions that return OrtStatus * return NULL on success; the caller owns any other
 * status and must release it or hand it on.
 */
#ifndef SPARSEC_ORT_API_H
#define SPARSEC_ORT_API_H

#include <stddef.h>
#include <stdint.h>

/* ONNX Runtime 1.17, the first with ParallelFor and shape inference for custom operators. */
#define ORT_API_VERSION 17

typedef struct OrtStatus OrtStatus;
typedef struct OrtValue OrtValue;
typedef struct OrtOpAttr OrtOpAttr;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtShapeInferContext OrtShapeInferContext;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef struct OrtCustomOp OrtCustomOp;
typedef struct OrtAllocator OrtAllocator;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtOp OrtOp;

typedef enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2, ORT_NOT_IMPLEMENTED = 9, ORT_INVALID_GRAPH = 10 } OrtErrorCode;
typedef enum {
    ORT_TENSOR_UNDEFINED = 0,
    ORT_TENSOR_FLOAT = 1,
    ORT_TENSOR_UINT8 = 2,
    ORT_TENSOR_INT8 = 3,
    ORT_TENSOR_INT32 = 6,
    ORT_TENSOR_FLOAT16 = 10,
    ORT_TENSOR_BFLOAT16 = 16
} OrtTensorType;
typedef enum { ORT_ARGUMENT_REQUIRED = 0, ORT_ARGUMENT_OPTIONAL = 1 } OrtArgumentKind;
typedef enum { ORT_MEMORY_CPU_INPUT = -2, ORT_MEMORY_DEFAULT = 0 } OrtMemoryType;
typedef enum { ORT_ATTRIBUTE_INT = 1 } OrtAttributeType;

#define GAP(first, last) void *gap_##first[(last) - (first) + 1]

typedef struct OrtApi {
    OrtStatus *(*CreateStatus)(OrtErrorCode code, const char *message);
    GAP(1, 25);
    OrtStatus *(*CreateCustomOpDomain)(const char *name, OrtCustomOpDomain **domain);
    OrtStatus *(*CustomOpDomain_Add)(OrtCustomOpDomain *domain, const OrtCustomOp *op);
    OrtStatus *(*AddCustomOpDomain)(OrtSessionOptions *options, OrtCustomOpDomain *domain);
    GAP(29, 48);
    OrtStatus *(*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo *info, void *data, size_t bytes,
                                                 const int64_t *dims, size_t count, OrtTensorType type,
                                                 OrtValue **value);
    GAP(50, 50);
    OrtStatus *(*GetTensorMutableData)(OrtValue *value, void **data);
    GAP(52, 56);
    OrtStatus *(*CreateTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo **info);
    OrtStatus *(*SetTensorElementType)(OrtTensorTypeAndShapeInfo *info, OrtTensorType type);
    OrtStatus *(*SetDimensions)(OrtTensorTypeAndShapeInfo *info, const int64_t *dims, size_t count);
    OrtStatus *(*GetTensorElementType)(const OrtTensorTypeAndShapeInfo *info, OrtTensorType *type);
    OrtStatus *(*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo *info, size_t *count);
    OrtStatus *(*GetDimensions)(const OrtTensorTypeAndShapeInfo *info, int64_t *dims, size_t count);
    OrtStatus *(*GetSymbolicDimensions)(const OrtTensorTypeAndShapeInfo *info, const char **names, size_t count);
    GAP(64, 64);
    OrtStatus *(*GetTensorTypeAndShape)(const OrtValue *value, OrtTensorTypeAndShapeInfo **info);
    GAP(66, 71);
    OrtStatus *(*MemoryInfoGetId)(const OrtMemoryInfo *info, int *id);
    GAP(73, 75);
    OrtStatus *(*AllocatorFree)(OrtAllocator *allocator, void *memory);
    OrtStatus *(*AllocatorGetInfo)(const OrtAllocator *allocator, const OrtMemoryInfo **info);
    GAP(78, 84);
    OrtStatus *(*KernelInfoGetAttribute_float)(const OrtKernelInfo *info, const char *name, float *value);
    OrtStatus *(*KernelInfoGetAttribute_int64)(const OrtKernelInfo *info, const char *name, int64_t *value);
    OrtStatus *(*KernelInfoGetAttribute_string)(const OrtKernelInfo *info, const char *name, char *value, size_t *size);
    GAP(88, 89);
    OrtStatus *(*KernelContext_GetInput)(const OrtKernelContext *context, size_t index, const OrtValue **value);
    OrtStatus *(*KernelContext_GetOutput)(OrtKernelContext *context, size_t index, const int64_t *dims, size_t count,
                                          OrtValue **value);
    GAP(92, 92);
    void (*ReleaseStatus)(OrtStatus *status);
    GAP(94, 95);
    void (*ReleaseValue)(OrtValue *value);
    GAP(97, 98);
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo *info);
    GAP(100, 100);
    void (*ReleaseCustomOpDomain)(OrtCustomOpDomain *domain);
    GAP(102, 131);
    void (*ReleaseAllocator)(OrtAllocator *allocator);
    GAP(133, 192);
    OrtStatus *(*KernelContext_GetGPUComputeStream)(const OrtKernelContext *context, void **stream);
    GAP(194, 212);
    OrtStatus *(*CreateOp)(const OrtKernelInfo *info, const char *name, const char *domain, int version,
                           const char **constraints, const OrtTensorType *types, int constraint_count,
                           const OrtOpAttr *const *attributes, int attribute_count, int input_count, int output_count,
                           OrtOp **op);
    OrtStatus *(*InvokeOp)(const OrtKernelContext *context, const OrtOp *op, const OrtValue *const *inputs,
                           int input_count, OrtValue *const *outputs, int output_count);
    void (*ReleaseOp)(OrtOp *op);
    GAP(216, 229);
    OrtStatus *(*KernelInfo_GetInputCount)(const OrtKernelInfo *info, size_t *count);
    GAP(231, 231);
    OrtStatus *(*KernelInfo_GetInputName)(const OrtKernelInfo *info, size_t index, char *name, size_t *size);
    GAP(233, 243);
    OrtStatus *(*KernelInfo_GetNodeName)(const OrtKernelInfo *info, char *name, size_t *size);
    GAP(245, 248);
    OrtStatus *(*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo *info, size_t index, int *is_constant,
                                                    const OrtValue **value);
    GAP(250, 267);
    OrtStatus *(*ShapeInferContext_GetInputTypeShape)(const OrtShapeInferContext *context, size_t index,
                                                      OrtTensorTypeAndShapeInfo **info);
    OrtStatus *(*ShapeInferContext_GetAttribute)(const OrtShapeInferContext *context, const char *name,
                                                 const OrtOpAttr **attribute);
    OrtStatus *(*ShapeInferContext_SetOutputTypeShape)(const OrtShapeInferContext *context, size_t index,
                                                       const OrtTensorTypeAndShapeInfo *info);
    OrtStatus *(*SetSymbolicDimensions)(OrtTensorTypeAndShapeInfo *info, const char **names, size_t count);
    OrtStatus *(*ReadOpAttr)(const OrtOpAttr *attribute, OrtAttributeType type, void *data, size_t size, size_t *used);
    GAP(273, 273);
    OrtStatus *(*KernelContext_ParallelFor)(const OrtKernelContext *context, void (*task)(void *data, size_t index),
                                            size_t total, size_t batches, void *data);
    GAP(275, 276);
    /* These two since ONNX Runtime 1.18. */
    OrtStatus *(*KernelContext_GetScratchBuffer)(const OrtKernelContext *context, const OrtMemoryInfo *info,
                                                 size_t bytes, void **memory);
    OrtStatus *(*KernelInfoGetAllocator)(const OrtKernelInfo *info, OrtMemoryType type, OrtAllocator **allocator);
} OrtApi;

#undef GAP

#define ASSERT_SLOT(function, slot) \
    _Static_assert(offsetof(OrtApi, function) == (slot) * sizeof(void *), #function " is not in slot " #slot)
ASSERT_SLOT(AddCustomOpDomain, 28);
ASSERT_SLOT(CreateTensorWithDataAsOrtValue, 49);
ASSERT_SLOT(GetTensorMutableData, 51);
ASSERT_SLOT(GetSymbolicDimensions, 63);
ASSERT_SLOT(GetTensorTypeAndShape, 65);
ASSERT_SLOT(MemoryInfoGetId, 72);
ASSERT_SLOT(AllocatorFree, 76);
ASSERT_SLOT(AllocatorGetInfo, 77);
ASSERT_SLOT(KernelInfoGetAttribute_float, 85);
ASSERT_SLOT(KernelInfoGetAttribute_string, 87);
ASSERT_SLOT(KernelContext_GetOutput, 91);
ASSERT_SLOT(ReleaseStatus, 93);
ASSERT_SLOT(ReleaseValue, 96);
ASSERT_SLOT(ReleaseTensorTypeAndShapeInfo, 99);
ASSERT_SLOT(ReleaseCustomOpDomain, 101);
ASSERT_SLOT(ReleaseAllocator, 132);
ASSERT_SLOT(KernelContext_GetGPUComputeStream, 193);
ASSERT_SLOT(CreateOp, 213);
ASSERT_SLOT(ReleaseOp, 215);
ASSERT_SLOT(KernelInfo_GetInputCount, 230);
ASSERT_SLOT(KernelInfo_GetInputName, 232);
ASSERT_SLOT(KernelInfo_GetNodeName, 244);
ASSERT_SLOT(KernelInfoGetConstantInput_tensor, 249);
ASSERT_SLOT(ReadOpAttr, 272);
ASSERT_SLOT(KernelContext_ParallelFor, 274);
ASSERT_SLOT(KernelInfoGetAllocator, 278);
#undef ASSERT_SLOT

typedef struct OrtApiBase {
    const OrtApi *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)(void);
} OrtApiBase;

/* ONNX Runtime reads only the members that `version` had; the later ones are here, NULL, so that it never reads past
 * the end. */
struct OrtCustomOp {
    uint32_t version;
    void *(*CreateKernel)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info);
    const char *(*GetName)(const OrtCustomOp *op);
    const char *(*GetExecutionProviderType)(const OrtCustomOp *op);
    OrtTensorType (*GetInputType)(const OrtCustomOp *op, size_t index);
    size_t (*GetInputTypeCount)(const OrtCustomOp *op);
    OrtTensorType (*GetOutputType)(const OrtCustomOp *op, size_t index);
    size_t (*GetOutputTypeCount)(const OrtCustomOp *op);
    void (*KernelCompute)(void *kernel, OrtKernelContext *context);
    void (*KernelDestroy)(void *kernel);
    OrtArgumentKind (*GetInputCharacteristic)(const OrtCustomOp *op, size_t index);
    OrtArgumentKind (*GetOutputCharacteristic)(const OrtCustomOp *op, size_t index);
    OrtMemoryType (*GetInputMemoryType)(const OrtCustomOp *op, size_t index);
    int (*GetVariadicInputMinArity)(const OrtCustomOp *op);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp *op);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp *op);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp *op);
    OrtStatus *(*CreateKernelV2)(const OrtCustomOp *op, const OrtApi *api, const OrtKernelInfo *info, void **kernel);
    OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *context);
    OrtStatus *(*InferOutputShapeFn)(const OrtCustomOp *op, OrtShapeInferContext *context);
    int (*GetStartVersion)(const OrtCustomOp *op);
    int (*GetEndVersion)(const OrtCustomOp *op);
    size_t (*GetMayInplace)(int **inputs, int **outputs);
    void (*ReleaseMayInplace)(int *inputs, int *outputs);
    size_t (*GetAliasMap)(int **inputs, int **outputs);
    void (*ReleaseAliasMap)(int *inputs, int *outputs);
};

_Static_assert(offsetof(OrtCustomOp, CreateKernelV2) == 17 * sizeof(void *), "CreateKernelV2 is not at byte 136");
_Static_assert(sizeof(OrtCustomOp) == 26 * sizeof(void *), "OrtCustomOp is not 208 bytes");

#endif
