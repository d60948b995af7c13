// What a compiled kernel and the runtime know of each other.
#pragma once

#define METALSIM_NOINSTRUMENT __attribute__((noinline, no_sanitize("all")))

namespace metalsim {

enum CallFlags : unsigned {
  kOrders = 1,       // orders the memory accesses of its lanes
  kWhole = 2,        // every lane of the SIMD-group must take part
  kMatrix = 4,       // and there must be 32 of them
  kProduct = 8,      // counted as a matrix product
  kThreadgroup = 16, // mem_threadgroup
  kDevice = 32,      // mem_device
  kBarrier = 64,     // simdgroup_barrier
};

struct Call;
using Op = void (*)(Call* const* lanes, unsigned mask);

// One lane's arrival at a collective: where, what, and its operands.
struct Call {
  Op op;
  const char* name;
  const char* file;
  unsigned line, column;
  unsigned flags;
  void* out;
  const void *a, *b, *c;
  unsigned n;
};

struct Ids {
  unsigned thread_position_in_grid[3];
  unsigned threadgroup_position_in_grid[3];
  unsigned thread_position_in_threadgroup[3];
  unsigned threads_per_threadgroup[3];
  unsigned threadgroups_per_grid[3];
  unsigned threads_per_grid[3];
  unsigned dispatch_threads_per_threadgroup[3];
  unsigned thread_index_in_threadgroup;
  unsigned simdgroup_index_in_threadgroup;
  unsigned thread_index_in_simdgroup;
  unsigned simdgroups_per_threadgroup;
  unsigned dispatch_simdgroups_per_threadgroup;
};

__attribute__((always_inline)) inline constexpr int row_of(int lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
__attribute__((always_inline)) inline constexpr int column_of(int lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }

}  // namespace metalsim

extern "C" {
// A lane arrives at a collective of its SIMD-group, or at a threadgroup barrier, and waits there.
__attribute__((convergent)) void metalsim_collective(metalsim::Op, const char* name,
                                                     const char* file, unsigned line,
                                                     unsigned column, unsigned flags,
                                                     void* out = nullptr,
                                                     const void* a = nullptr,
                                                     const void* b = nullptr,
                                                     const void* c = nullptr, unsigned n = 0);
__attribute__((convergent)) void metalsim_threadgroup_barrier(const char* file, unsigned line,
                                                              unsigned column, unsigned flags);
// d = a b + c, row-major float[64]; d may be any of them.
void metalsim_product(float* d, const float* a, const float* b, const float* c);
void metalsim_access(const void*, unsigned long bytes, bool write, bool whole_simdgroup);
void metalsim_atomic(const void*, unsigned long bytes, bool reads);
// Atomic compare and exchange; what was there before.
unsigned metalsim_replace(unsigned*, unsigned expected, unsigned value);
// A lane took from one that is not there.
void metalsim_lane_fault(const metalsim::Call*, unsigned lane, unsigned self);
unsigned metalsim_lane();
// The kernel under test, called once a thread.
void metalsim_kernel(void* const* buffers, const metalsim::Ids&);
}
