// Runs one thread block of a kernel after another on a CPU (see emulate.py). Every CUDA thread is a fibre that runs
// until it must wait, for its warp or its thread block; so a kernel without the barriers and waits that it needs sees
// poison, old values or new ones.
#include "emulate.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <string>
#include <vector>

namespace emulate {

Dim thread, threads, block, grid;

[[noreturn]] void fail(const std::string& why);

struct Copy {
  void* to;
  const void* from;
  size_t bytes, size;  // bytes read; bytes written, the rest as zeros

  void run() const {
    std::memcpy(to, from, bytes);
    std::memset(static_cast<char*>(to) + bytes, 0, size - bytes);
  }
};

struct Fibre {
  unsigned index = 0;
  int lane = 0;
  struct Warp* warp = nullptr;
  bool done = false;
  std::function<bool()> ready;  // what it waits for; empty when it can run
  std::vector<Copy> open;      // asynchronous copies of no group yet
  std::deque<std::vector<Copy>> groups;
  ucontext_t start;
  jmp_buf at;
  bool started = false;
};

struct Warp {
  int lanes = 0, arrived = 0, generation = 0;
  std::string what;
  void* slots[32];
};

struct Barrier {  // of the thread block
  int arrived = 0, generation = 0;
};

constexpr size_t kPage = 4096, kStack = 1 << 16;
// Shared addresses start here, so that 0 is none of them.
constexpr uint32_t kShared = 1 << 10;

Fibre* current = nullptr;
std::vector<Fibre> fibres;
std::vector<Warp> warps;
Barrier block_barrier;
jmp_buf scheduler;
void (*kernel)() = nullptr;
char* shared = nullptr;
size_t shared_bytes = 0;
bool late = false;  // asynchronous copies run when they are waited for, else at once
uint64_t seed = 0;

void fail(const std::string& why) {
  std::fprintf(stderr, "emulation: %s", why.c_str());
  if (current) std::fprintf(stderr, " (block %u, thread %u)", block.x, current->index);
  std::exit(3);
}

// `bytes` of memory that ends at a page that traps, up to `align` bytes of poison.
char* guarded(size_t bytes, size_t align) {
  size_t room = (bytes + align - 1) / align * align, pages = (room + kPage - 1) / kPage * kPage;
  char* base = static_cast<char*>(
      mmap(nullptr, pages + 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (base == MAP_FAILED) fail("no memory");
  mprotect(base, kPage, PROT_NONE);
  mprotect(base + kPage + pages, kPage, PROT_NONE);
  std::memset(base + kPage, 0xff, pages);  // a NaN in every floating-point type
  return base + kPage + pages - room;
}

void wait(std::function<bool()> ready) {
  if (ready()) return;
  current->ready = std::move(ready);
  if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

// All lanes of a warp meet; the last one to come computes on what each brought, then all go on.
void collective(const char* what, void* mine, const std::function<void(void**)>& compute) {
  Warp& warp = *current->warp;
  if (!warp.arrived) warp.what = what;
  if (warp.what != what) fail(std::string("the warp's lanes diverge: ") + what + " and " + warp.what);
  warp.slots[current->lane] = mine;
  if (++warp.arrived == warp.lanes) {
    if (warp.lanes != 32) fail("a warp of less than 32 lanes");
    compute(warp.slots);
    warp.arrived = 0;
    ++warp.generation;
  } else {
    int generation = warp.generation;
    wait([&warp, generation] { return warp.generation != generation; });
  }
}

void barrier() {
  Barrier& b = block_barrier;
  if (++b.arrived == int(threads.x)) {
    b.arrived = 0;
    ++b.generation;
  } else {
    int generation = b.generation;
    wait([&b, generation] { return b.generation != generation; });
  }
}

uint32_t shared_address(const void* p) {
  int64_t offset = static_cast<const char*>(p) - shared;
  if (offset < 0 || size_t(offset) > shared_bytes) fail("a pointer that is not to shared memory");
  return kShared + uint32_t(offset);
}

// Where `bytes` at a shared address are; they must lie in shared memory, aligned to `align`.
char* shared_pointer(uint32_t address, size_t bytes, size_t align) {
  size_t offset = address - kShared;
  if (address < kShared || offset + bytes > shared_bytes) fail("a shared address out of range");
  if (offset % align) fail("a shared address that is not aligned to " + std::to_string(align));
  return shared + offset;
}

void* dynamic_shared() { return shared; }

void entry() {
  kernel();
  current->groups.push_back(current->open);
  for (const auto& group : current->groups)
    if (!group.empty()) fail("asynchronous copies that nothing waited for");
  current->done = true;
  _longjmp(scheduler, 1);
}

// Run a fibre until it waits; whether it ran at all.
bool resume(Fibre& fibre) {
  if (fibre.done || (fibre.ready && !fibre.ready())) return false;
  fibre.ready = nullptr;
  current = &fibre;
  thread.x = fibre.index;
  if (!_setjmp(scheduler)) {
    if (fibre.started) _longjmp(fibre.at, 1);
    fibre.started = true;
    setcontext(&fibre.start);
  }
  current = nullptr;
  return true;
}

uint64_t random() {  // splitmix64
  uint64_t z = seed += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

// One thread block: `order` 0 runs the first warp that can run as far as it goes, 1 the last, 2 one by chance a step.
void run_block(int order, std::vector<char>& stacks) {
  int count = int(threads.x), last = (count - 1) / 32;
  fibres.assign(count, Fibre());
  warps.assign(last + 1, Warp());
  block_barrier = Barrier();
  std::memset(shared, 0xff, shared_bytes);
  for (int i = 0; i < count; ++i) {
    Fibre& fibre = fibres[i];
    fibre.index = i;
    fibre.lane = i % 32;
    fibre.warp = &warps[i / 32];
    ++fibre.warp->lanes;
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = stacks.data() + size_t(i) * kStack;
    fibre.start.uc_stack.ss_size = kStack;
    makecontext(&fibre.start, reinterpret_cast<void (*)()>(entry), 0);
  }
  auto step = [&](int warp) {
    bool ran = false;
    for (int i = 0, n = warps[warp].lanes; i < n; ++i) ran |= resume(fibres[warp * 32 + (order == 1 ? n - 1 - i : i)]);
    return ran;
  };
  for (;;) {
    bool ran = false;
    int first = order == 2 ? int(random() % (last + 1)) : 0;
    for (int i = 0; i <= last && !ran; ++i) ran = step(order == 1 ? last - i : (first + i) % (last + 1));
    if (ran) continue;
    if (std::all_of(fibres.begin(), fibres.end(), [](const Fibre& f) { return f.done; })) return;
    fail("deadlock: every thread waits");
  }
}

}  // namespace emulate

uint32_t __cvta_generic_to_shared(const void* p) { return emulate::shared_address(p); }
void __syncthreads() { emulate::barrier(); }
void __syncwarp() { emulate::collective("__syncwarp", nullptr, [](void**) {}); }

namespace ptx {

using emulate::current;

void cp_async(uint32_t dst, const void* src, size_t size, size_t bytes) {
  if (bytes > size) emulate::fail("cp.async reads more than it writes");
  if (reinterpret_cast<uintptr_t>(src) % size) emulate::fail("cp.async from an address that is not aligned");
  emulate::Copy copy{emulate::shared_pointer(dst, size, size), src, bytes, size};
  // Until it is waited for, nobody may rely on what is there.
  std::memset(copy.to, 0xff, size);
  current->open.push_back(copy);
  if (!emulate::late) copy.run();
}

void cp_async_ca_shared_global(uint32_t dst, const void* src, int size, uint32_t bytes) {
  if (size != 4 && size != 8 && size != 16) emulate::fail("cp.async.ca of neither 4, 8 nor 16 bytes");
  cp_async(dst, src, size, bytes);
}
void cp_async_cg_shared_global(uint32_t dst, const void* src, int size, uint32_t bytes) {
  if (size != 16) emulate::fail("cp.async.cg of other than 16 bytes");
  cp_async(dst, src, size, bytes);
}

void cp_async_commit_group() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

void cp_async_wait_group(int pending) {
  while (int(current->groups.size()) > pending) {
    if (emulate::late)
      for (const emulate::Copy& copy : current->groups.front()) copy.run();
    current->groups.pop_front();
  }
}

// PTX ISA, "Warp-level matrix load instruction: ldmatrix": lane l gives row l % 8 of matrix l / 8, and receives
// elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each, or of its transpose.
template <int count, bool transposed>
void ldmatrix(const char* what, std::array<uint32_t*, count> to, uint32_t address) {
  struct Mine {
    std::array<uint32_t*, count> to;
    uint32_t address;
  } mine{to, address};
  emulate::collective(what, &mine, [](void** slots) {
    for (int m = 0; m < count; ++m) {
      uint16_t matrix[8][8];
      for (int row = 0; row < 8; ++row)
        std::memcpy(matrix[row], emulate::shared_pointer(static_cast<Mine*>(slots[8 * m + row])->address, 16, 16), 16);
      for (int lane = 0; lane < 32; ++lane) {
        int row = lane / 4, col = 2 * (lane % 4);
        uint32_t low = transposed ? matrix[col][row] : matrix[row][col];
        uint32_t high = transposed ? matrix[col + 1][row] : matrix[row][col + 1];
        *static_cast<Mine*>(slots[lane])->to[m] = high << 16 | low;
      }
    }
  });
}

void ldmatrix_sync_aligned_m8n8_x4_shared_b16(R& a, R& b, R& c, R& d, R at) {
  ldmatrix<4, false>("ldmatrix.x4", {&a, &b, &c, &d}, at);
}
void ldmatrix_sync_aligned_m8n8_x2_shared_b16(R& a, R& b, R at) {
  ldmatrix<2, false>("ldmatrix.x2", {&a, &b}, at);
}
void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(R& a, R& b, R& c, R& d, R at) {
  ldmatrix<4, true>("ldmatrix.x4.trans", {&a, &b, &c, &d}, at);
}

// To the nearest of 10 bits of fraction, ties away from zero.
void cvt_rna_tf32_f32(R& to, float from) { to = (bits_as<R>(from) + 0x1000) & ~0x1fffu; }

void st_global(const void* to, std::initializer_list<R> words) {
  if (reinterpret_cast<uintptr_t>(to) % (4 * words.size())) emulate::fail("a store to an address that is not aligned");
  std::memcpy(const_cast<void*>(to), words.begin(), 4 * words.size());
}
void st_global_b32(const void* to, R a) { st_global(to, {a}); }
void st_global_v2_b32(const void* to, R a, R b) { st_global(to, {a, b}); }
void st_global_v4_b32(const void* to, R a, R b, R c, R d) { st_global(to, {a, b, c, d}); }

// Element `e` of a register.
template <typename T>
float element(R word, int e) {
  return bits_as<T>(uint16_t(word >> 16 * e));
}
template <>
float element<float>(R word, int) {
  return bits_as<float>(word & ~0x1fffu);  // of TF32 the low bits are void
}

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type" (and m16n8k8 for tf32): with g = lane / 4 and
// t = lane % 4, and `wide` elements in each 32-bit register,
//   A: register i holds row g + 8 (i % 2), columns wide (t + 4 (i / 2)) onward;
//   B: register i holds column g, rows wide (t + 4 i) onward;
//   C, D: register i is row g + 8 (i / 2), column 2 t + i % 2.
template <typename T>
void mma_m16n8(const char* what, std::array<float*, 4> d, std::array<R, 4> a, std::array<R, 2> b,
               std::array<float, 4> c) {
  struct Mine {
    std::array<float*, 4> d;
    std::array<R, 4> a;
    std::array<R, 2> b;
    std::array<float, 4> c;
  } mine{d, a, b, c};
  emulate::collective(what, &mine, [](void** slots) {
    constexpr int wide = 4 / sizeof(T), k = 8 * wide;
    float left[16][k], right[k][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Mine& from = *static_cast<Mine*>(slots[lane]);
      int g = lane / 4, t = lane % 4;
      for (int e = 0; e < wide; ++e) {
        for (int i = 0; i < 4; ++i) left[g + 8 * (i % 2)][wide * (t + 4 * (i / 2)) + e] = element<T>(from.a[i], e);
        for (int i = 0; i < 2; ++i) right[wide * (t + 4 * i) + e][g] = element<T>(from.b[i], e);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      const Mine& to = *static_cast<Mine*>(slots[lane]);
      for (int i = 0; i < 4; ++i) {
        int row = lane / 4 + 8 * (i / 2), col = 2 * (lane % 4) + i % 2;
        float sum = to.c[i];
        for (int j = 0; j < k; ++j) sum += left[row][j] * right[j][col];
        *to.d[i] = sum;
      }
    }
  });
}

#define MMA(name, type)                                                                                            \
  void name(float& d0, float& d1, float& d2, float& d3, R a0, R a1, R a2, R a3, R b0, R b1, float c0, float c1, \
                   float c2, float c3) {                                                                           \
    mma_m16n8<type>(#name, {&d0, &d1, &d2, &d3}, {a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3});                    \
  }
MMA(mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32, half)
MMA(mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32, nv_bfloat16)
MMA(mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32, float)
#undef MMA

}  // namespace ptx

// ---- The process: a launch on standard input, the arrays after it on standard output ----

namespace emulate {

void read_exactly(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) fail("the input is too short");
}

int serve(int64_t count, void (*launch)(const uint64_t*)) {
  int64_t head[7];  // grid, threads, dynamic shared memory, order, late, seed, arguments
  read_exactly(head, sizeof(head));
  grid.x = unsigned(head[0]), threads.x = unsigned(head[1]), shared_bytes = size_t(head[2]);
  late = head[4], seed = uint64_t(head[5]);
  if (head[6] != count) fail("the kernel takes " + std::to_string(count) + " arguments");
  static std::vector<uint64_t> arguments;
  std::vector<std::pair<char*, size_t>> arrays;
  for (int64_t i = 0; i < head[6]; ++i) {
    int64_t bytes, value = 0;
    read_exactly(&bytes, sizeof(bytes));
    if (bytes < 0) {
      read_exactly(&value, sizeof(value));
    } else {
      char* array = guarded(size_t(bytes), 16);
      read_exactly(array, size_t(bytes));
      arrays.emplace_back(array, size_t(bytes));
      value = reinterpret_cast<int64_t>(array);
    }
    arguments.push_back(uint64_t(value));
  }
  static auto call = launch;
  kernel = [] { call(arguments.data()); };
  shared = guarded(shared_bytes, 128);
  std::vector<char> stacks(threads.x * kStack);
  for (block.x = 0; block.x < grid.x; ++block.x) run_block(int(head[3]), stacks);
  for (auto [array, bytes] : arrays) {
    for (size_t i = bytes; i < (bytes + 15) / 16 * 16; ++i)
      if (array[i] != char(0xff)) fail("a write beyond the end of an array");
    std::fwrite(array, 1, bytes, stdout);
  }
  return 0;
}

}  // namespace emulate
