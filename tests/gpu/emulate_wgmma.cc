// A thread block of a Hopper kernel on a CPU (see emulate_wgmma.py). Every CUDA thread is a fibre; it runs until it must wait.
// Copies and tensor cores work beside the threads, at once or as late as the kernel lets them, so that a missing wait meets
// poison, old values or a deadlock.
#include "emulate_wgmma.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace machine {

constexpr int kWarp = 32, kWarpgroup = 128;
constexpr size_t kStack = 1 << 17, kPage = 4096;
constexpr uint32_t kBase = 1024;  // the first shared address, so that 0 is none

// A copy of `bytes` from `from` to shared address `to`, which then counts at `barrier`; or, with no bytes, an arrival.
struct Copy {
  uint32_t to, bytes, barrier;
  const char* from;
};

struct Fibre {
  unsigned index;
  ucontext_t start;
  jmp_buf at;
  bool started = false, done = false;
  std::function<bool()> ready;
  std::string what;             // it waits for
  std::deque<Copy> copies;      // cp.async and the arrivals behind them, in order
  int registers = 0;            // after setmaxnreg
  bool proxy_fenced = false;    // since it last waited for a barrier
  bool wgmma_fenced = false;    // since its sums were last its own
  bool in_flight = false;       // its sums are the tensor cores'
  size_t issued = 0;            // wgmma instructions
  std::vector<size_t> commits;  // `issued` at each commit
};

struct Barrier {  // mbarrier
  int count, pending;
  int64_t bytes = 0;
  unsigned phase = 0;
};

struct Meeting {
  int arrived = 0, generation = 0;
  std::string what;
  void* slots[kWarp];
};

struct Wgmma {
  uint64_t a, b;
  int n, issued = 0;
  float (*element)(uint16_t);
};

struct Warpgroup {
  std::vector<Wgmma> queue;
  size_t executed = 0;
  std::vector<float*> registers[kWarpgroup];
  std::vector<float> sums[kWarpgroup];
};

Dim block, grid;
unsigned threads;
Fibre* current = nullptr;
std::vector<Fibre> fibres;
std::vector<Meeting> warps;
std::map<int, Meeting> named;
std::map<uint32_t, Barrier> barriers;
std::vector<Copy> bulk;
std::vector<Warpgroup> warpgroups;
std::vector<char> shared;
std::vector<std::pair<char*, size_t>> arrays;
jmp_buf scheduler;
int haste = 0;  // asynchronous work is done: 0 as late as possible, 1 at once, 2 at random
uint64_t seed = 0;

[[noreturn]] void fail(const std::string& why) {
  std::string who = current ? " (block " + std::to_string(block.x) + ", thread " + std::to_string(current->index) + ")" : "";
  std::fprintf(stderr, "%s%s\n", why.c_str(), who.c_str());
  std::exit(3);
}

uint64_t random() {  // splitmix64
  uint64_t z = seed += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

bool soon() { return haste == 1 || (haste == 2 && random() % 2); }

void wait(const std::string& what, std::function<bool()> ready) {
  if (ready()) return;
  current->what = what;
  current->ready = std::move(ready);
  if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

// Shared memory at `address`; nothing but barrier instructions may touch a barrier.
char* at(uint32_t address, size_t bytes, size_t align) {
  if (address < kBase || address - kBase + bytes > shared.size()) fail("shared memory: address out of range");
  if (address % align) fail("shared memory: address not aligned");
  auto next = barriers.lower_bound(address < 8 ? 0 : address - 7);
  if (next != barriers.end() && next->first < address + bytes) fail("shared memory: access to a barrier");
  return shared.data() + (address - kBase);
}

const char* global(const void* pointer, size_t bytes, size_t align) {
  const char* p = static_cast<const char*>(pointer);
  if (reinterpret_cast<uintptr_t>(p) % align) fail("global memory: address not aligned");
  for (auto [start, size] : arrays)
    if (p >= start && p + bytes <= start + size) return p;
  fail("global memory: access outside the arrays");
}

Barrier& barrier(uint32_t address) {
  auto found = barriers.find(address);
  if (found == barriers.end()) fail("no barrier at this address");
  return found->second;
}

void turn(Barrier& b) {
  if (b.pending < 0) fail("a barrier: too many arrivals");
  if (b.bytes < 0) fail("a barrier: more bytes than announced");
  if (b.pending || b.bytes) return;
  b.pending = b.count;
  ++b.phase;
}

void execute(const Copy& copy) {
  Barrier* b = copy.barrier ? &barrier(copy.barrier) : nullptr;
  if (copy.bytes) {
    std::memcpy(at(copy.to, copy.bytes, 16), copy.from, copy.bytes);
    if (!b) return;
    b->bytes -= copy.bytes;
  } else {
    --b->pending;
  }
  turn(*b);
}

// Until the copy is done nobody may rely on what is there.
void poison(const Copy& copy) { std::memset(at(copy.to, copy.bytes, 16), 0xff, copy.bytes); }

void drain(Fibre& fibre) {
  execute(fibre.copies.front());
  fibre.copies.pop_front();
}

// PTX ISA, "Matrix Descriptor Format": 16-byte units, bits 62-63 = 1 for the 128-byte swizzle, which exchanges the 16-byte
// chunks of a 128-byte line by bits 7-9 of the address.
struct Operand {
  uint32_t start, leading, stride;

  explicit Operand(uint64_t d)
      : start((d & 0x3fff) << 4), leading((d >> 16 & 0x3fff) << 4), stride((d >> 32 & 0x3fff) << 4) {
    if (d >> 62 != 1) fail("wgmma: not the 128-byte swizzle");
    if (d >> 49 & 7) fail("wgmma: a base offset");
    if (stride % 1024 || (start & 1023) / 128) fail("wgmma: atoms that are not aligned to 1,024 bytes");
  }
  uint16_t load(uint32_t offset) const {
    uint32_t address = start + offset;
    return bits_as<uint16_t>(*reinterpret_cast<const uint16_t*>(at(address ^ (address >> 7 & 7) << 4, 2, 2)));
  }
};

// D[64, n] += A.T[16, 64] @ B[n, 16]: A transposed (MN-major), B not (K-major). PTX ISA, "Strides": with MN-major, 64
// elements of M are a line, the next 64 are `leading` away, 8 lines of K an atom, the next 8 `stride` away; with K-major, 8
// lines of N are an atom, the next 8 `stride` away. "Register Fragments" of D: see below.
void execute(Warpgroup& group, const Wgmma& op) {
  Operand left(op.a), right(op.b);
  static float a[16][64], b[16][256], d[64][256];
  for (int k = 0; k < 16; ++k) {
    for (int m = 0; m < 64; ++m) a[k][m] = op.element(left.load(m * 2 + k / 8 * left.stride + k % 8 * 128));
    for (int n = 0; n < op.n; ++n) b[k][n] = op.element(right.load(n / 8 * right.stride + n % 8 * 128 + k * 2));
  }
  std::memset(d, 0, sizeof(d));
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < op.n; ++n) d[m][n] += a[k][m] * b[k][n];
  for (int t = 0; t < kWarpgroup; ++t)
    for (int r = 0; r < op.n / 2; ++r) {
      int m = t / 32 * 16 + t % 32 / 4 + r / 2 % 2 * 8, n = r / 4 * 8 + t % 4 * 2 + r % 2;
      group.sums[t][r] += d[m][n];
    }
}

void execute_up_to(Warpgroup& group, size_t count) {
  for (; group.executed < count; ++group.executed) execute(group, group.queue[group.executed]);
}

// All lanes of a warp meet; the last one computes on what each brought.
void collective(const char* what, void* mine, const std::function<void(void**)>& compute) {
  Meeting& warp = warps[current->index / kWarp];
  if (!warp.arrived) warp.what = what;
  if (warp.what != what) fail(std::string("the warp's lanes diverge: ") + what + " and " + warp.what);
  warp.slots[current->index % kWarp] = mine;
  int generation = warp.generation;
  if (++warp.arrived == kWarp) {
    compute(warp.slots);
    warp.arrived = 0;
    ++warp.generation;
  }
  wait(what, [&warp, generation] { return warp.generation != generation; });
}

void meet(int id, int count) {
  Meeting& m = named[id];
  int generation = m.generation;
  if (++m.arrived == count) {
    m.arrived = 0;
    ++m.generation;
  }
  wait("bar.sync " + std::to_string(id), [&m, generation] { return m.generation != generation; });
}

void (*kernel)() = nullptr;

void entry() {
  kernel();
  if (current->in_flight || current->issued != (current->commits.empty() ? 0 : current->commits.back()))
    fail("the thread ends before its wgmma instructions");
  current->done = true;
  _longjmp(scheduler, 1);
}

bool resume(Fibre& fibre) {
  if (fibre.done || (fibre.ready && !fibre.ready())) return false;
  fibre.ready = nullptr;
  current = &fibre;
  if (!_setjmp(scheduler)) {
    if (fibre.started) _longjmp(fibre.at, 1);
    fibre.started = true;
    setcontext(&fibre.start);
  }
  current = nullptr;
  return true;
}

// One of the copies that are on their way, any bulk copy or the first of a thread; whether there was one.
bool copy_something() {
  std::vector<Fibre*> waiting;
  for (Fibre& fibre : fibres)
    if (!fibre.copies.empty()) waiting.push_back(&fibre);
  size_t choice = waiting.size() + bulk.size();
  if (!choice) return false;
  choice = random() % choice;
  if (choice < waiting.size()) {
    drain(*waiting[choice]);
  } else {
    Copy copy = bulk[choice - waiting.size()];
    bulk.erase(bulk.begin() + (choice - waiting.size()));
    execute(copy);
  }
  return true;
}

void run_block(std::vector<char>& stacks) {
  size_t warp_count = threads / kWarp;
  fibres = std::vector<Fibre>(threads);
  warps.assign(warp_count, {});
  warpgroups = std::vector<Warpgroup>(threads / kWarpgroup);
  named.clear(), barriers.clear(), bulk.clear();
  std::memset(shared.data(), 0xff, shared.size());
  for (unsigned i = 0; i < threads; ++i) {
    fibres[i].index = i;
    getcontext(&fibres[i].start);
    fibres[i].start.uc_stack.ss_sp = stacks.data() + i * kStack;
    fibres[i].start.uc_stack.ss_size = kStack;
    makecontext(&fibres[i].start, entry, 0);
  }
  auto step = [](size_t warp) {
    bool ran = false;
    for (int lane = 0; lane < kWarp; ++lane) ran |= resume(fibres[warp * kWarp + lane]);
    return ran;
  };
  for (;;) {
    if (haste == 2 && random() % 2) copy_something();
    bool ran = false;
    size_t first = random();
    for (size_t i = 0; i < warp_count && !ran; ++i) ran = step((first + i) % warp_count);
    if (ran || copy_something()) continue;
    std::string waiting;
    for (const Fibre& fibre : fibres)
      if (!fibre.done && fibre.index % kWarp == 0)
        waiting += "\n  thread " + std::to_string(fibre.index) + ": " + fibre.what;
    if (!waiting.empty()) fail("deadlock" + waiting);
    break;
  }
  int registers = 0;
  for (const Fibre& fibre : fibres) registers += fibre.registers;
  if (registers > 65536) fail("setmaxnreg: more registers than there are");
}

// A launch on standard input, the arrays after it on standard output.
void read_exactly(void* to, size_t bytes) {
  if (std::fread(to, 1, bytes, stdin) != bytes) fail("the input is too short");
}

int serve(int count, void (*launch)(const uint64_t*)) {
  int64_t head[5];  // blocks, threads, shared memory, haste, seed
  read_exactly(head, sizeof(head));
  grid.x = unsigned(head[0]), threads = unsigned(head[1]), haste = int(head[3]), seed = uint64_t(head[4]);
  shared.resize(size_t(head[2]));
  static std::vector<uint64_t> arguments;
  for (int i = 0; i < count; ++i) {
    int64_t bytes, value = 0;
    read_exactly(&bytes, sizeof(bytes));
    if (bytes < 0) {
      read_exactly(&value, sizeof(value));
    } else {  // ends at a page that traps; its start is aligned as its size is
      size_t pages = (size_t(bytes) + kPage - 1) / kPage * kPage;
      void* room = mmap(nullptr, pages + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (room == MAP_FAILED) fail("no memory");
      char* array = static_cast<char*>(room) + pages - bytes;
      mprotect(static_cast<char*>(room) + pages, kPage, PROT_NONE);
      read_exactly(array, size_t(bytes));
      arrays.emplace_back(array, size_t(bytes));
      value = reinterpret_cast<int64_t>(array);
    }
    arguments.push_back(uint64_t(value));
  }
  static auto call = launch;
  kernel = [] { call(arguments.data()); };
  std::vector<char> stacks(threads * kStack);
  for (block.x = 0; block.x < grid.x; ++block.x) run_block(stacks);
  for (auto [array, bytes] : arrays) std::fwrite(array, 1, bytes, stdout);
  return 0;
}

}  // namespace machine

Dim machine::thread() { return {current->index}; }
void* machine::dynamic_shared() { return shared.data(); }
uint32_t __cvta_generic_to_shared(const void* p) {
  return machine::kBase + uint32_t(static_cast<const char*>(p) - machine::shared.data());
}
void __syncthreads() { machine::meet(0, int(machine::threads)); }

namespace ptx {

using machine::current;
using machine::fail;

void mbarrier_init_shared_b64(R address, R count) {
  machine::at(address, 8, 8);
  machine::barriers[address] = {int(count), int(count)};
}
void fence_mbarrier_init_release_cluster() {}
void mbarrier_arrive_shared_b64(R address) {
  machine::Barrier& b = machine::barrier(address);
  --b.pending;
  machine::turn(b);
}
void mbarrier_arrive_expect_tx_shared_b64(R address, R bytes) {
  machine::barrier(address).bytes += bytes;
  mbarrier_arrive_shared_b64(address);
}
void mbarrier_wait(R address, int parity) {
  machine::Barrier& b = machine::barrier(address);
  if (parity != 0 && parity != 1) fail("mbarrier: a parity that is neither 0 nor 1");
  machine::wait("mbarrier " + std::to_string(address), [&b, parity] { return int(b.phase & 1) != parity; });
  current->proxy_fenced = false;
}

void cp_async_cg_shared_global_L2_128B(R to, const void* from, int size) {
  if (size != 16) fail("cp.async.cg: other than 16 bytes");
  machine::Copy copy{to, 16, 0, machine::global(from, 16, 16)};
  machine::poison(copy);
  current->copies.push_back(copy);
  if (machine::soon()) machine::drain(*current);
}
void cp_async_mbarrier_arrive_noinc_shared_b64(R barrier) {
  current->copies.push_back({0, 0, barrier, nullptr});
  if (machine::soon())
    while (!current->copies.empty()) machine::drain(*current);
}
void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes(R to, const void* from, R bytes, R barrier) {
  if (!bytes || bytes % 16) fail("cp.async.bulk: bytes that are no multiple of 16");
  machine::Copy copy{to, bytes, barrier, machine::global(from, bytes, 16)};
  machine::poison(copy);
  if (machine::soon()) machine::execute(copy);
  else machine::bulk.push_back(copy);
}
void fence_proxy_async_shared_cta() { current->proxy_fenced = true; }

void setmaxnreg(int registers) {
  machine::collective("setmaxnreg", nullptr, [](void**) {});
  current->registers = registers;
}
void setmaxnreg_inc_sync_aligned_u32(int registers) { setmaxnreg(registers); }
void setmaxnreg_dec_sync_aligned_u32(int registers) { setmaxnreg(registers); }
void bar_sync(int id, int count) {
  if (id < 0 || id > 15 || count % 32) fail("bar.sync: no such barrier");
  machine::meet(id, count);
}

template <typename T>
float widen(uint16_t bits) {
  return bits_as<T>(bits);
}

// The sums belong to the tensor cores from here until a wait that leaves nothing pending; they are poison meanwhile.
void wgmma(const char* type, int n, float* const* registers, uint64_t a, uint64_t b, R scale_d, int scale_a, int scale_b,
           int trans_a, int trans_b) {
  if (!scale_d || scale_a != 1 || scale_b != 1 || trans_a != 1 || trans_b != 0) fail("wgmma: a form that is not emulated");
  machine::Warpgroup& group = machine::warpgroups[current->index / machine::kWarpgroup];
  int lane = current->index % machine::kWarpgroup;
  std::vector<float*> d(registers, registers + n / 2);
  machine::collective("wgmma", nullptr, [](void**) {});
  if (!current->proxy_fenced) fail("wgmma: no fence between the generic proxy's writes and it");
  if (!current->in_flight) {
    if (!current->wgmma_fenced) fail("wgmma: no wgmma.fence behind the last access to its registers");
    current->in_flight = true;
    group.registers[lane] = d;
    group.sums[lane].clear();
    for (float* r : d) group.sums[lane].push_back(*r), *r = NAN;
  }
  if (group.registers[lane] != d) fail("wgmma: other registers while some are in flight");
  machine::Wgmma op{a, b, n, 0, std::strcmp(type, "bf16") ? widen<half> : widen<bfloat16>};
  if (current->issued == group.queue.size()) group.queue.push_back(op);
  machine::Wgmma& mine = group.queue[current->issued++];
  if (mine.a != a || mine.b != b || mine.n != n) fail("wgmma: the threads of a warpgroup disagree");
  if (++mine.issued == machine::kWarpgroup && machine::soon()) machine::execute_up_to(group, current->issued);
}
void wgmma_fence_sync_aligned() { current->wgmma_fenced = true; }
void wgmma_commit_group_sync_aligned() { current->commits.push_back(current->issued); }
void wgmma_wait_group_sync_aligned(int pending) {
  if (int(current->commits.size()) <= pending) return;
  size_t target = current->commits[current->commits.size() - 1 - pending];
  machine::Warpgroup& group = machine::warpgroups[current->index / machine::kWarpgroup];
  machine::wait("wgmma.wait_group", [&group, target] { return !target || group.queue[target - 1].issued == machine::kWarpgroup; });
  machine::execute_up_to(group, target);
  if (target != current->issued || !current->in_flight) return;
  int lane = current->index % machine::kWarpgroup;
  for (size_t r = 0; r < group.sums[lane].size(); ++r) *group.registers[lane][r] = group.sums[lane][r];
  current->in_flight = current->wgmma_fenced = false;
}

// PTX ISA, ldmatrix and stmatrix .x4.trans: lane l gives row l % 8 of matrix l / 8; its register m holds elements
// [2 (l % 4)][l / 4] and [2 (l % 4) + 1][l / 4] of matrix m.
struct Matrices {
  R* registers[4];
  R address;
};
uint16_t* element(void** slots, int m, int row, int column) {
  return reinterpret_cast<uint16_t*>(machine::at(static_cast<Matrices*>(slots[8 * m + row])->address, 16, 16)) + column;
}
void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(R& a, R& b, R& c, R& d, R address) {
  Matrices mine{{&a, &b, &c, &d}, address};
  machine::collective("ldmatrix", &mine, [](void** slots) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m) {
        int row = lane % 4 * 2, column = lane / 4;
        R low = *element(slots, m, row, column), high = *element(slots, m, row + 1, column);
        *static_cast<Matrices*>(slots[lane])->registers[m] = high << 16 | low;
      }
  });
}
void stmatrix_sync_aligned_m8n8_x4_trans_shared_b16(R address, R a, R b, R c, R d) {
  Matrices mine{{&a, &b, &c, &d}, address};
  machine::collective("stmatrix", &mine, [](void** slots) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m) {
        R word = *static_cast<Matrices*>(slots[lane])->registers[m];
        *element(slots, m, lane % 4 * 2, lane / 4) = uint16_t(word);
        *element(slots, m, lane % 4 * 2 + 1, lane / 4) = uint16_t(word >> 16);
      }
  });
}

void ld(const char* from, R& a, R& b, R& c, R& d) {
  R words[4];
  std::memcpy(words, from, 16);
  a = words[0], b = words[1], c = words[2], d = words[3];
}
void st(char* to, R a, R b, R c, R d) {
  R words[4] = {a, b, c, d};
  std::memcpy(to, words, 16);
}
void ld_shared_v4_b32(R& a, R& b, R& c, R& d, R from) { ld(machine::at(from, 16, 16), a, b, c, d); }
void ld_global_v4_b32(R& a, R& b, R& c, R& d, const void* from) { ld(machine::global(from, 16, 16), a, b, c, d); }
void st_shared_v4_b32(R to, R a, R b, R c, R d) { st(machine::at(to, 16, 16), a, b, c, d); }
void st_global_v4_b32(const void* to, R a, R b, R c, R d) {
  st(const_cast<char*>(machine::global(to, 16, 16)), a, b, c, d);
}
void cvt_rn_f16x2_f32(R& d, float high, float low) { d = R(half::round(high).bits) << 16 | half::round(low).bits; }
void cvt_rn_bf16x2_f32(R& d, float high, float low) {
  d = R(bfloat16::round(high).bits) << 16 | bfloat16::round(low).bits;
}

}  // namespace ptx
