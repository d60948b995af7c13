// Threads as fibers, SIMD-group and threadgroup semantics, and the checks of every access.
#include "runtime.h"

using metalsim::Call;
using metalsim::Ids;
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned;
using u64 = unsigned long;

namespace {

// Kinds of fault; runner.py names them in the same order.
enum Fault : u64 {
  kNone, kOutOfBounds, kRace, kUnwritten, kReadOnly, kDivergentBarrier, kDivergentCollective,
  kInactiveLane, kArrayIndex, kMisaligned, kOverflow, kDivideByZero,
};

// Where memory lies.
enum Space : u64 { kDeviceSpace, kThreadgroupSpace, kThreadSpace, kUnknownSpace };

struct Report {
  u64 fault, space, index, offset, bytes, write;
  u64 pc, other_pc, thread, other_thread, group, other_write, line, other_line, count;
  char file[64], name[64], other_name[64];
  u64 device_read, device_written, products, barriers, simdgroup_barriers, collectives;
};

struct Array { u64 address, bytes; };
struct Buffer { u64 address, bytes, writable, initialised, granule, counted, shadow, mask; };

struct Request {
  u64 checked, strict, seed, first, step;
  u64 grid[3], threads[3];
  Report* report;
  u64 slots, slot_bits, n_buffers, n_arrays, arrays_start, array_bits, array_shadow;
  u64 stacks, stack_bytes, image_start, image_end;
  Buffer* buffers;
  Array* arrays;
};

constexpr u32 kMany = 0xffffffff;

// Who touched a granule since the last ordering point, as far as a later access must know.
struct Toucher { u32 group, threadgroup_epoch, simd_epoch, thread, simdgroup, pc; };
struct Shadow { Toucher writer, reader; u64 atomic; };

struct Thread { void* stack; Ids ids; };

struct Simdgroup {
  u32 existing, live, ready, at_simd, at_barrier, epoch;
  Call* calls[32];
};

const Request* request;
Report* report;
Thread threads[1024];
Simdgroup groups[32];
u32 n_groups, current, current_group;
u32 group_index, group_start, threadgroup_epoch, device_epoch;
u64 random_state;
void* home;
void* kernel_buffers[64];
// Copies of what every access looks at.
u64 slots, n_buffers;
u32 slot_bits;
bool checked, counted[64];

u32 random_below(u32 n) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return u32((random_state >> 20) % n);
}

u32 random_bit(u32 mask) {
  for (u32 skip = random_below(u32(__builtin_popcount(mask))); skip; --skip) mask &= mask - 1;
  return u32(__builtin_ctz(mask));
}

void copy_text(char (&to)[64], const char* from) {
  u32 i = 0;
  const char* start = from;
  for (const char* p = from; *p; ++p)
    if (*p == '/') start = p + 1;
  for (; start[i] && i < 63; ++i) to[i] = start[i];
  to[i] = 0;
}

}  // namespace

extern "C" {
void metalsim_switch(void** save, void* load);
[[noreturn]] void metalsim_leave();
extern char __ehdr_start __attribute__((visibility("hidden")));
}

#if defined(__x86_64__)
asm(R"(
.globl metalsim_switch
.hidden metalsim_switch
metalsim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.globl metalsim_leave
.hidden metalsim_leave
metalsim_leave:
  movl $231, %eax
  movl $3, %edi
  syscall
)");
constexpr u32 kSaved = 6;
#else
#error "metalsim runs on x86-64 only"
#endif

namespace {

void fault_access(Fault kind, Space space, u64 index, u64 offset, u64 bytes, bool write, u64 pc) {
  report->space = space;
  report->index = index;
  report->offset = offset;
  report->bytes = bytes;
  report->write = write;
  report->pc = pc;
  report->thread = current;
  report->group = group_index;
  report->fault = kind;
  metalsim_leave();
}

void fault_call(Fault kind, const Call* call, const Call* other, u32 thread, u32 other_thread,
                u32 count) {
  copy_text(report->file, call->file);
  copy_text(report->name, call->name);
  report->line = call->line;
  if (other) {
    copy_text(report->other_name, other->name);
    report->other_line = other->line;
  }
  report->thread = thread;
  report->other_thread = other_thread;
  report->count = count;
  report->group = group_index;
  report->fault = kind;
  metalsim_leave();
}

void switch_to(u32 thread) {
  if (thread == current) return;
  u32 from = current;
  current = thread;
  metalsim_switch(&threads[from].stack, threads[thread].stack);
}

// All lanes of a SIMD-group wait: run the collective that the lowest of them waits for.
void resolve(Simdgroup& group) {
  u32 base = u32(&group - groups) * 32;
  u32 lead = u32(__builtin_ctz(group.at_simd));
  Call* first = group.calls[lead];
  u32 mask = 0;
  for (u32 rest = group.at_simd; rest; rest &= rest - 1) {
    u32 lane = u32(__builtin_ctz(rest));
    Call* call = group.calls[lane];
    if (call->op == first->op && call->line == first->line && call->column == first->column)
      mask |= 1u << lane;
  }
  if (checked) {
    if (mask != group.live) {
      u32 other = u32(__builtin_ctz(group.live & ~mask));
      fault_call(kDivergentCollective, first, group.calls[other], base + lead, base + other,
                 u32(__builtin_popcount(mask)));
    }
    u32 needed = first->flags & metalsim::kMatrix ? 0xffffffffu
        : first->flags & metalsim::kWhole        ? group.existing
                                                 : mask;
    if (mask != needed)
      fault_call(kDivergentCollective, first, nullptr, base + lead, base + lead,
                 u32(__builtin_popcount(mask)));
  }
  if (first->op) first->op(group.calls, mask);
  u32 flags = first->flags;
  report->products += (flags & metalsim::kProduct) != 0;
  report->simdgroup_barriers += (flags & metalsim::kBarrier) != 0;
  report->collectives += 1;
  if (request->strict ? flags & metalsim::kBarrier && flags & metalsim::kThreadgroup
                      : flags & metalsim::kOrders)
    group.epoch += 1;
  group.at_simd &= ~mask;
  group.ready |= mask;
}

// Every thread waits or has left: open the threadgroup barrier.
void open_barrier() {
  u32 lead = 0, left = 0;
  while (!groups[lead / 32].at_barrier) lead += 32;
  lead += u32(__builtin_ctz(groups[lead / 32].at_barrier));
  Call* first = groups[lead / 32].calls[lead % 32];
  for (u32 i = 0; i < n_groups; ++i) {
    Simdgroup& group = groups[i];
    left += u32(__builtin_popcount(group.existing & ~group.live));
    if (checked)
      for (u32 rest = group.at_barrier; rest; rest &= rest - 1) {
        u32 lane = u32(__builtin_ctz(rest));
        Call* call = group.calls[lane];
        if (call->line != first->line || call->column != first->column)
          fault_call(kDivergentBarrier, first, call, lead, i * 32 + lane, 0);
      }
    group.ready = group.at_barrier;
    group.at_barrier = 0;
    group.epoch += 1;
  }
  if (checked && left)
    fault_call(kDivergentBarrier, first, nullptr, lead, lead, left);
  threadgroup_epoch += (first->flags & metalsim::kThreadgroup) != 0;
  device_epoch += (first->flags & metalsim::kDevice) != 0;
  report->barriers += 1;
}

// Give the processor to a thread that can run; returns when the caller can.
void wait() {
  for (;;) {
    if (random_state) {
      u32 runnable = 0;
      for (u32 i = 0; i < n_groups; ++i)
        if (groups[i].ready | groups[i].at_simd) runnable |= 1u << i;
      if (runnable) current_group = random_bit(runnable);
    }
    Simdgroup* group = &groups[current_group];
    if (!(group->ready | group->at_simd)) {
      u32 i = 0;
      while (i < n_groups && !(groups[i].ready | groups[i].at_simd)) ++i;
      if (i < n_groups) {
        current_group = i;
        continue;
      }
      bool waiting = false;
      for (i = 0; i < n_groups; ++i) waiting |= groups[i].at_barrier != 0;
      if (!waiting) {
        void* forgotten;
        metalsim_switch(&forgotten, home);
      }
      open_barrier();
      continue;
    }
    if (!group->ready) {
      resolve(*group);
      continue;
    }
    u32 base = current_group * 32, lane;
    if (random_state)
      lane = random_bit(group->ready);
    else if (current - base < 32 && group->ready >> (current - base) & 1)
      lane = current - base;
    else
      lane = u32(__builtin_ctz(group->ready));
    group->ready &= ~(1u << lane);
    switch_to(base + lane);
    return;
  }
}

void thread_main() {
  metalsim_kernel(kernel_buffers, threads[current].ids);
  groups[current / 32].live &= ~(1u << current % 32);
  wait();
}

void start_thread(u32 index) {
  // Frames of different lanes start in different cache sets.
  u64 top = request->stacks + (index + 1) * request->stack_bytes - 64 - (index * 1088) % 8192;
  u64* frame = reinterpret_cast<u64*>(top & ~u64(15));
  *frame = reinterpret_cast<u64>(&thread_main);
  for (u32 i = 0; i < kSaved; ++i) *--frame = 0;
  threads[index].stack = frame;
}

void run_group(const u32 (&position)[3], const u32 (&per_grid)[3]) {
  u32 size[3];
  for (int d = 0; d < 3; ++d) {
    u32 start = position[d] * u32(request->threads[d]);
    u32 left = u32(request->grid[d]) - start;
    size[d] = left < request->threads[d] ? left : u32(request->threads[d]);
  }
  u32 n = size[0] * size[1] * size[2];
  n_groups = (n + 31) / 32;
  group_start = ++threadgroup_epoch;
  ++device_epoch;
  for (u32 i = 0; i < request->n_arrays; ++i)
    __builtin_memset(reinterpret_cast<void*>(request->arrays[i].address), 0xff,
                     request->arrays[i].bytes);
  for (u32 i = 0; i < n_groups; ++i) {
    u32 lanes = n - i * 32 < 32 ? n - i * 32 : 32;
    Simdgroup& group = groups[i];
    group.existing = group.live = group.ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
    group.at_simd = group.at_barrier = 0;
    group.epoch += 1;
  }
  for (u32 i = 0; i < n; ++i) {
    Ids& ids = threads[i].ids;
    u32 at[3] = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
    for (int d = 0; d < 3; ++d) {
      ids.thread_position_in_threadgroup[d] = at[d];
      ids.threadgroup_position_in_grid[d] = position[d];
      ids.thread_position_in_grid[d] = position[d] * u32(request->threads[d]) + at[d];
      ids.threads_per_threadgroup[d] = size[d];
      ids.dispatch_threads_per_threadgroup[d] = u32(request->threads[d]);
      ids.threadgroups_per_grid[d] = per_grid[d];
      ids.threads_per_grid[d] = u32(request->grid[d]);
    }
    ids.thread_index_in_threadgroup = i;
    ids.simdgroup_index_in_threadgroup = i / 32;
    ids.thread_index_in_simdgroup = i % 32;
    ids.simdgroups_per_threadgroup = n_groups;
    ids.dispatch_simdgroups_per_threadgroup =
        u32((request->threads[0] * request->threads[1] * request->threads[2] + 31) / 32);
    start_thread(i);
  }
  current_group = random_state ? random_below(n_groups) : 0;
  u32 lane = random_state ? random_bit(groups[current_group].ready) : 0;
  groups[current_group].ready &= ~(1u << lane);
  current = current_group * 32 + lane;
  metalsim_switch(&home, threads[current].stack);
}

// ---- checks of memory accesses ----

enum How { kRead, kWrite, kAtomic, kAtomicStore };

struct Access {
  How how;
  u32 thread, simdgroup, epoch, group_epoch, pc;
};

// Whether an earlier access by `t` is not ordered before this one.
bool unordered(const Toucher& t, const Access& now, bool device) {
  if (!t.threadgroup_epoch) return false;
  if (device && t.group != group_index) return true;
  if (t.threadgroup_epoch != now.group_epoch) return false;
  if (t.simdgroup != now.simdgroup) return true;
  return t.simd_epoch == now.epoch && t.thread != now.thread;
}

// Remember an access beside those by others that a later one could still conflict with.
void merge(Toucher& t, const Access& now, bool device) {
  bool same = t.threadgroup_epoch == now.group_epoch;
  if (device && t.threadgroup_epoch && t.group != group_index) {
    t.group = kMany;
  } else if (same && t.simdgroup != now.simdgroup) {
    t.group = group_index;
    t.simdgroup = kMany;
  } else if (same && t.simd_epoch == now.epoch) {
    t.group = group_index;
    if (t.thread != now.thread) t.thread = kMany;
  } else {
    t = {group_index, now.group_epoch, now.epoch, now.thread, now.simdgroup, now.pc};
    return;
  }
  t.threadgroup_epoch = now.group_epoch;
  t.simd_epoch = now.epoch;
  t.pc = now.pc;
}

void race(Space space, u64 index, u64 offset, u64 bytes, const Access& now, const Toucher& t,
          bool other_write) {
  report->other_pc = t.pc;
  report->other_write = other_write;
  report->other_thread = t.thread;
  report->count = space == kDeviceSpace && t.group != group_index;
  fault_access(kRace, space, index, offset, bytes, now.how != kRead, now.pc);
}

void check_shadow(Shadow* shadow, u64 first, u64 last, u64 granule, Space space, u64 index,
                  const Access& now, bool must_be_written) {
  bool device = space == kDeviceSpace;
  for (u64 i = first; i <= last; ++i) {
    Shadow& s = shadow[i];
    bool atomic = now.how >= kAtomic, both_atomic = s.atomic && atomic;
    if ((now.how == kRead || now.how == kAtomic) && must_be_written &&
        (device ? !s.writer.threadgroup_epoch : s.writer.threadgroup_epoch < group_start))
      fault_access(kUnwritten, space, index, i * granule, granule, false, now.pc);
    if (!both_atomic && unordered(s.writer, now, device))
      race(space, index, i * granule, granule, now, s.writer, true);
    if (now.how == kRead) {
      merge(s.reader, now, device);
      continue;
    }
    if (unordered(s.reader, now, device))
      race(space, index, i * granule, granule, now, s.reader, false);
    if (both_atomic)
      merge(s.writer, now, device);
    else
      s.writer = {group_index, now.group_epoch, now.epoch, now.thread, now.simdgroup, now.pc};
    s.atomic = atomic;
  }
}

__attribute__((noinline)) void check(u64 address, u64 bytes, How how, bool whole, u64 pc) {
  u64 slot = (address - slots) >> slot_bits;
  if (slot < n_buffers) {
    const Buffer& b = request->buffers[slot];
    u64 offset = address - b.address;
    if (offset >= b.bytes || bytes > b.bytes - offset) {
      report->count = 1;
      fault_access(kOutOfBounds, kDeviceSpace, slot, offset, bytes, how != kRead, pc);
    }
    if (b.mask)
      for (u64 i = offset / b.granule; i <= (offset + bytes - 1) / b.granule; ++i)
        if (!reinterpret_cast<const u8*>(b.mask)[i])
          fault_access(kOutOfBounds, kDeviceSpace, slot, offset, bytes, how != kRead, pc);
    if (!b.writable) {
      if (how != kRead) fault_access(kReadOnly, kDeviceSpace, slot, offset, bytes, true, pc);
      return;
    }
    Access now = {how, whole ? 1024 + current / 32 : current, current / 32,
                  groups[current / 32].epoch, device_epoch, u32(pc)};
    check_shadow(reinterpret_cast<Shadow*>(b.shadow), offset / b.granule,
                 (offset + bytes - 1) / b.granule, b.granule, kDeviceSpace, slot, now,
                 !b.initialised);
    return;
  }
  // A slot of nothing lies before the first array and one after the last.
  u64 index = (address - request->arrays_start + (1ul << request->array_bits)) >>
      request->array_bits;
  if (request->n_arrays && index < request->n_arrays + 2) {
    index = index == 0 ? 0 : index > request->n_arrays ? request->n_arrays - 1 : index - 1;
    const Array& a = request->arrays[index];
    u64 offset = address - a.address;
    if (offset >= a.bytes || bytes > a.bytes - offset)
      fault_access(kOutOfBounds, kThreadgroupSpace, index, offset, bytes, how != kRead, pc);
    Access now = {how, whole ? 1024 + current / 32 : current, current / 32,
                  groups[current / 32].epoch, threadgroup_epoch, u32(pc)};
    u64 shadow = request->array_shadow + (sizeof(Shadow) << 15) * index;
    check_shadow(reinterpret_cast<Shadow*>(shadow), offset, offset + bytes - 1, 1,
                 kThreadgroupSpace, index, now, true);
    return;
  }
  u64 stack = request->stacks + current * request->stack_bytes;
  if (address - stack < request->stack_bytes) return;
  if (how == kRead && address - request->image_start < request->image_end - request->image_start)
    return;
  Space space = address - request->stacks < 1024 * request->stack_bytes ? kThreadSpace
                                                                        : kUnknownSpace;
  fault_access(kOutOfBounds, space, 0, address, bytes, how != kRead, pc);
}

// Counts an access to device memory, and in checked mode looks whether it is right.
__attribute__((always_inline)) inline void enter(const void* p, u64 bytes, How how, bool whole,
                                                 u64 pc) {
  u64 address = reinterpret_cast<u64>(p);
  if (u64 slot = (address - slots) >> slot_bits; slot < n_buffers && counted[slot]) {
    if (how == kRead || how == kAtomic) report->device_read += bytes;
    if (how != kRead) report->device_written += bytes;
  }
  if (checked) check(address, bytes, how, whole, pc);
}

// Offset of the instruction that calls, inside this shared object.
inline u64 offset_of(void* return_address) {
  return reinterpret_cast<u64>(return_address) - 1 - reinterpret_cast<u64>(&__ehdr_start);
}

struct Location { const char* file; u32 line, column; };

void fault_location(Fault kind, const Location* location, u64 value) {
  copy_text(report->file, location->file);
  report->line = location->line;
  report->offset = value;
  report->thread = current;
  report->group = group_index;
  report->fault = kind;
  metalsim_leave();
}

}  // namespace

extern "C" {

void metalsim_collective(metalsim::Op op, const char* name, const char* file, u32 line, u32 column,
                         u32 flags, void* out, const void* a, const void* b, const void* c,
                         u32 n) {
  Call call{op, name, file, line, column, flags, out, a, b, c, n};
  Simdgroup& group = groups[current / 32];
  u32 lane = current % 32;
  group.calls[lane] = &call;
  group.at_simd |= 1u << lane;
  if (random_state || !group.ready) return wait();
  u32 next = u32(__builtin_ctz(group.ready));
  group.ready &= group.ready - 1;
  switch_to(current - lane + next);
}

void metalsim_threadgroup_barrier(const char* file, u32 line, u32 column, u32 flags) {
  Call call{nullptr, "threadgroup_barrier", file, line, column, flags};
  Simdgroup& group = groups[current / 32];
  u32 lane = current % 32;
  group.calls[lane] = &call;
  group.at_barrier |= 1u << lane;
  wait();
}

void metalsim_product(float* d, const float* a, const float* b, const float* c) {
  typedef float row __attribute__((ext_vector_type(8), aligned(4)));
  row out[8];
  for (int r = 0; r < 8; ++r) {
    row sum = *reinterpret_cast<const row*>(c + r * 8);
    for (int k = 0; k < 8; ++k) {
      row scaled = *reinterpret_cast<const row*>(b + k * 8);
      row factor = a[r * 8 + k];
      sum = __builtin_elementwise_fma(factor, scaled, sum);
    }
    out[r] = sum;
  }
  for (int r = 0; r < 8; ++r) *reinterpret_cast<row*>(d + r * 8) = out[r];
}

void metalsim_access(const void* p, u64 bytes, bool write, bool whole) {
  enter(p, bytes, write ? kWrite : kRead, whole,
        offset_of(__builtin_return_address(0)));
}

void metalsim_atomic(const void* p, u64 bytes, bool reads) {
  enter(p, bytes, reads ? kAtomic : kAtomicStore, false,
        offset_of(__builtin_return_address(0)));
}

u32 metalsim_replace(u32* p, u32 expected, u32 value) {
  __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

void metalsim_lane_fault(const Call* call, u32 lane, u32 self) {
  if (checked) fault_call(kInactiveLane, call, nullptr, self, lane, lane);
}

u32 metalsim_lane() { return current % 32; }

// The loads and stores that clang's thread sanitizer finds in the kernel.
#define METALSIM_HOOKS(n)                                                                    \
  void __tsan_read##n(void* p) {                                                             \
    enter(p, n, kRead, false, offset_of(__builtin_return_address(0)));                  \
  }                                                                                          \
  void __tsan_write##n(void* p) {                                                            \
    enter(p, n, kWrite, false, offset_of(__builtin_return_address(0)));                 \
  }                                                                                          \
  void __tsan_unaligned_read##n(void* p) {                                                   \
    enter(p, n, kRead, false, offset_of(__builtin_return_address(0)));                  \
  }                                                                                          \
  void __tsan_unaligned_write##n(void* p) {                                                  \
    enter(p, n, kWrite, false, offset_of(__builtin_return_address(0)));                 \
  }
METALSIM_HOOKS(1)
METALSIM_HOOKS(2)
METALSIM_HOOKS(4)
METALSIM_HOOKS(8)
METALSIM_HOOKS(16)

void* __tsan_memcpy(void* to, const void* from, u64 n) {
  u64 pc = offset_of(__builtin_return_address(0));
  if (n) {
    enter(from, n, kRead, false, pc);
    enter(to, n, kWrite, false, pc);
  }
  return __builtin_memmove(to, from, n);
}
void* __tsan_memmove(void* to, const void* from, u64 n) {
  u64 pc = offset_of(__builtin_return_address(0));
  if (n) {
    enter(from, n, kRead, false, pc);
    enter(to, n, kWrite, false, pc);
  }
  return __builtin_memmove(to, from, n);
}
void* __tsan_memset(void* to, int value, u64 n) {
  if (n) enter(to, n, kWrite, false, offset_of(__builtin_return_address(0)));
  return __builtin_memset(to, value, n);
}
void __tsan_init() {}

#define METALSIM_UBSAN(name, kind)                                                 \
  void __ubsan_handle_##name##_abort(const Location* data, u64 value) {            \
    fault_location(kind, data, value);                                             \
  }
METALSIM_UBSAN(out_of_bounds, kArrayIndex)
METALSIM_UBSAN(type_mismatch_v1, kMisaligned)
METALSIM_UBSAN(add_overflow, kOverflow)
METALSIM_UBSAN(sub_overflow, kOverflow)
METALSIM_UBSAN(mul_overflow, kOverflow)
METALSIM_UBSAN(negate_overflow, kOverflow)
METALSIM_UBSAN(divrem_overflow, kDivideByZero)

// compiler-rt's conversion, which the kernel calls for bfloat: round to nearest even.
__bf16 __truncsfbf2(float x) {
  u32 bits = __builtin_bit_cast(u32, x);
  if ((bits & 0x7fffffff) > 0x7f800000)
    bits |= 0x400000;
  else
    bits += 0x7fff + (bits >> 16 & 1);
  return __builtin_bit_cast(__bf16, u16(bits >> 16));
}

__attribute__((visibility("default"))) char metalsim_anchor;

__attribute__((visibility("default"))) void metalsim_run(const Request* r) {
  request = r;
  report = r->report;
  random_state = r->seed;
  slots = r->slots;
  slot_bits = u32(r->slot_bits);
  n_buffers = r->n_buffers;
  checked = r->checked;
  for (u32 i = 0; i < n_buffers; ++i) {
    kernel_buffers[i] = reinterpret_cast<void*>(r->buffers[i].address);
    counted[i] = r->buffers[i].counted;
  }
  u32 per_grid[3];
  for (int d = 0; d < 3; ++d) per_grid[d] = u32((r->grid[d] + r->threads[d] - 1) / r->threads[d]);
  u32 n = per_grid[0] * per_grid[1] * per_grid[2];
  // A random order of threadgroups: an odd multiplier permutes a power of two.
  u32 power = 1;
  while (power < n) power <<= 1;
  u32 factor = random_state ? random_below(power) | 1 : 1, shift = random_state ? random_below(power) : 0;
  for (u32 i = u32(r->first); i < power; i += u32(r->step)) {
    group_index = (i * factor + shift) & (power - 1);
    if (group_index >= n) continue;
    u32 position[3] = {group_index % per_grid[0], group_index / per_grid[0] % per_grid[1],
                       group_index / (per_grid[0] * per_grid[1])};
    run_group(position, per_grid);
  }
}
}
