// What a Hopper kernel sees of the machine that emulate_wgmma.cc emulates, instead of CUDA's headers.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
using uint = unsigned int;
using ushort = unsigned short;
using uchar = unsigned char;

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline float min(float a, float b) { return a < b ? a : b; }
inline float max(float a, float b) { return a > b ? a : b; }

// ---- 16-bit floats ----

template <typename To, typename From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

struct half {  // IEEE binary16
  uint16_t bits;
  static half round(float x) {  // to nearest even
    uint32_t u = bits_as<uint32_t>(x), sign = u >> 16 & 0x8000;
    u &= 0x7fffffff;
    if (u > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (u >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
    if (u < 0x38800000) return {uint16_t(sign | uint32_t(std::nearbyintf(bits_as<float>(u) * 0x1p24f)))};
    return {uint16_t(sign | (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13)};
  }
  operator float() const {
    uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
    if (exponent == 31) return bits_as<float>(sign | 0x7f800000 | fraction << 13);
    float size = exponent ? bits_as<float>((exponent + 112) << 23 | fraction << 13) : fraction * 0x1p-24f;
    return sign ? -size : size;
  }
};

struct bfloat16 {
  uint16_t bits;
  static bfloat16 round(float x) {  // to nearest even
    uint32_t u = bits_as<uint32_t>(x);
    return {uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
  }
  operator float() const { return bits_as<float>(uint32_t(bits) << 16); }
};

// ---- The machine ----

struct Dim {
  unsigned x = 0, y = 0, z = 0;
};

namespace machine {

Dim thread();
extern Dim block, grid;
void* dynamic_shared();
// Read a launch of `kernel` with this many arguments from standard input, run it, and write its arrays.
int serve(int arguments, void (*kernel)(const uint64_t*));

}  // namespace machine

#define threadIdx (machine::thread())
#define blockIdx (machine::block)
uint32_t __cvta_generic_to_shared(const void* p);
void __syncthreads();

// ---- Instructions: named as in the PTX ISA with _ for every dot, operands in the order of its text ----

namespace ptx {

using R = uint32_t;

void mbarrier_init_shared_b64(R address, R count);
void fence_mbarrier_init_release_cluster();
void mbarrier_arrive_shared_b64(R address);
void mbarrier_arrive_expect_tx_shared_b64(R address, R bytes);
void mbarrier_wait(R address, int parity);
void cp_async_cg_shared_global_L2_128B(R to, const void* from, int size);
void cp_async_mbarrier_arrive_noinc_shared_b64(R barrier);
void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes(R to, const void* from, R bytes, R barrier);
void fence_proxy_async_shared_cta();
void setmaxnreg_inc_sync_aligned_u32(int registers);
void setmaxnreg_dec_sync_aligned_u32(int registers);
void bar_sync(int id, int count);
// m64 n `n` k16 with operands of `type`, "f16" or "bf16"; `d` are n / 2 registers.
void wgmma(const char* type, int n, float* const* d, uint64_t a, uint64_t b, R scale_d, int scale_a, int scale_b,
           int trans_a, int trans_b);
void wgmma_fence_sync_aligned();
void wgmma_commit_group_sync_aligned();
void wgmma_wait_group_sync_aligned(int pending);
void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(R& a, R& b, R& c, R& d, R address);
void stmatrix_sync_aligned_m8n8_x4_trans_shared_b16(R address, R a, R b, R c, R d);
void ld_shared_v4_b32(R& a, R& b, R& c, R& d, R from);
void ld_global_v4_b32(R& a, R& b, R& c, R& d, const void* from);
void st_shared_v4_b32(R to, R a, R b, R c, R d);
void st_global_v4_b32(const void* to, R a, R b, R c, R d);
void cvt_rn_f16x2_f32(R& d, float high, float low);
void cvt_rn_bf16x2_f32(R& d, float high, float low);

}  // namespace ptx
