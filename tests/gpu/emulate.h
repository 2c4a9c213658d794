// What CUDA's headers declare, for kernels that emulate.cc runs on a CPU: see emulate.py. Small, because every kernel
// that a test runs is compiled with it.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

// ---- Types ----

template <typename To, typename From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}

// IEEE binary16.
struct half {
  uint16_t bits;
  half() = default;
  half(float x) {  // to nearest even
    uint32_t u = bits_as<uint32_t>(x), sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) bits = sign | 0x7e00;
    else if (u >= 0x477ff000) bits = sign | 0x7c00;
    else if (u < 0x38800000) bits = sign | uint16_t(nearbyintf(bits_as<float>(u) * 0x1p24f));  // subnormal
    else bits = sign | ((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
  }
  operator float() const {
    uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    if (exponent == 31) return bits_as<float>(sign | 0x7f800000 | fraction << 13);
    float size = exponent ? bits_as<float>(exponent + 112 << 23 | fraction << 13) : fraction * 0x1p-24f;
    return sign ? -size : size;
  }
};
using __half = half;

struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  nv_bfloat16(float x) {  // to nearest even
    uint32_t u = bits_as<uint32_t>(x);
    bits = (u & 0x7fffffff) > 0x7f800000 ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  }
  operator float() const { return bits_as<float>(uint32_t(bits) << 16); }
};
using __nv_bfloat16 = nv_bfloat16;

#define VECTORS(type, name)                                        \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };         \
  struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };   \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
using uint = unsigned int;
using ushort = unsigned short;
using uchar = unsigned char;
VECTORS(int, int)
VECTORS(uint, uint)
VECTORS(float, float)
VECTORS(half, half)
VECTORS(nv_bfloat16, nv_bfloat16)
VECTORS(ushort, ushort)
VECTORS(short, short)
using __half2 = half2;
using __nv_bfloat162 = nv_bfloat162;

inline half __float2half_rn(float x) { return half(x); }
inline float __half2float(half x) { return x; }
inline uint16_t __half_as_ushort(half x) { return x.bits; }
inline half __ushort_as_half(uint16_t x) { return bits_as<half>(x); }
inline nv_bfloat16 __float2bfloat16(float x) { return nv_bfloat16(x); }
inline float __bfloat162float(nv_bfloat16 x) { return x; }
inline uint __pack_half2(half x, half y) { return uint(y.bits) << 16 | x.bits; }
inline uint __pack_nv_bfloat162(nv_bfloat16 x, nv_bfloat16 y) { return uint(y.bits) << 16 | x.bits; }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline float __fdividef(float x, float y) { return x / y; }
template <typename T>
T max(T a, T b) { return a > b ? a : b; }
template <typename T>
T min(T a, T b) { return a < b ? a : b; }

// ---- Threads and shared memory ----

namespace emulate {

struct Dim {
  unsigned x = 0, y = 0, z = 0;
};
extern Dim thread, threads, block, grid;  // threadIdx, blockDim, blockIdx, gridDim

void* dynamic_shared();
// Serve standard input and output (see emulate.py); `launch` calls the kernel with `count` arguments, addresses or
// integers.
int serve(int64_t count, void (*launch)(const uint64_t*));

}  // namespace emulate

#define threadIdx (emulate::thread)
#define blockIdx (emulate::block)
#define gridDim (emulate::grid)
#define blockDim (emulate::threads)
uint32_t __cvta_generic_to_shared(const void* p);
void __syncthreads();
void __syncwarp();

// ---- Instructions: named as in the PTX ISA with _ for every dot, operands in the order of its text ----

namespace ptx {

using R = uint32_t;

void cp_async_ca_shared_global(R dst, const void* src, int size, R bytes);
void cp_async_cg_shared_global(R dst, const void* src, int size, R bytes);
void cp_async_commit_group();
void cp_async_wait_group(int pending);
void ldmatrix_sync_aligned_m8n8_x4_shared_b16(R& a, R& b, R& c, R& d, R at);
void ldmatrix_sync_aligned_m8n8_x2_shared_b16(R& a, R& b, R at);
void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(R& a, R& b, R& c, R& d, R at);
void cvt_rna_tf32_f32(R& to, float from);
void st_global_b32(const void* to, R a);
void st_global_v2_b32(const void* to, R a, R b);
void st_global_v4_b32(const void* to, R a, R b, R c, R d);

#define MMA(name)                                                                                              \
  void name(float& d0, float& d1, float& d2, float& d3, R a0, R a1, R a2, R a3, R b0, R b1, float c0, float c1, \
            float c2, float c3);
MMA(mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32)
MMA(mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32)
MMA(mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32)
#undef MMA

}  // namespace ptx
