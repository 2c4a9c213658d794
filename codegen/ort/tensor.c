/* Shapes, and addition with broadcasting. */
#include "sparse_linear.h"

const char *type_name(OrtTensorType type) {
    switch (type) {
    case ORT_TENSOR_FLOAT:
        return "float32";
    case ORT_TENSOR_UINT8:
        return "uint8";
    case ORT_TENSOR_INT8:
        return "int8";
    case ORT_TENSOR_INT32:
        return "int32";
    case ORT_TENSOR_FLOAT16:
        return "float16";
    case ORT_TENSOR_BFLOAT16:
        return "bfloat16";
    default:
        return "of another type";
    }
}

int64_t shape_count(const Shape *shape, size_t rank) {
    /* Unsigned, because the other dimensions of an empty tensor may be too large to multiply. */
    uint64_t count = 1;
    for (size_t i = 0; i < rank; i++)
        count *= (uint64_t)shape->dims[i];
    return (int64_t)count;
}

/* Dimension `i` of `shape` as if it were padded on the left with ones to `rank`. */
static int64_t padded_dim(const Shape *shape, size_t rank, size_t i) {
    size_t missing = rank - shape->rank;
    return i < missing ? 1 : shape->dims[i - missing];
}

bool shape_broadcast(const Shape *a, const Shape *b, Shape *result) {
    result->rank = a->rank > b->rank ? a->rank : b->rank;
    for (size_t i = 0; i < result->rank; i++) {
        int64_t x = padded_dim(a, result->rank, i), y = padded_dim(b, result->rank, i);
        if (x != y && x != 1 && y != 1)
            return false;
        result->dims[i] = x == 1 ? y : x;
    }
    return true;
}

/* Elements between neighbours along each dimension of `shape`, for a tensor that is broadcast to it. */
static void broadcast_strides(const Shape *shape, const Shape *tensor, int64_t strides[MAX_RANK]) {
    int64_t stride = 1;
    for (size_t i = shape->rank; i-- > 0;) {
        int64_t dim = padded_dim(tensor, shape->rank, i);
        strides[i] = dim == 1 ? 0 : stride;
        stride *= dim;
    }
}

void tensor_add(const Shape *shape, const Tensor *a, const Tensor *b, float *out) {
    int64_t a_strides[MAX_RANK], b_strides[MAX_RANK], position[MAX_RANK] = {0};
    broadcast_strides(shape, &a->shape, a_strides);
    broadcast_strides(shape, &b->shape, b_strides);
    const float *x = a->data, *y = b->data;
    /* The result has the product's last dimension, so its rank is at least 1. */
    size_t last = shape->rank - 1;
    int64_t width = shape->dims[last], lines = shape_count(shape, last);
    for (int64_t line = 0; line < lines; line++) {
        for (int64_t i = 0; i < width; i++)
            out[line * width + i] = x[i * a_strides[last]] + y[i * b_strides[last]];
        /* Step to the next line like an odometer: the last dimension that is not at its end moves. */
        for (size_t i = last; i-- > 0;) {
            x += a_strides[i];
            y += b_strides[i];
            if (++position[i] < shape->dims[i])
                break;
            x -= a_strides[i] * shape->dims[i];
            y -= b_strides[i] * shape->dims[i];
            position[i] = 0;
        }
    }
}
