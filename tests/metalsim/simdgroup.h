// SIMD-group collectives, simdgroup_matrix and atomics.
#pragma once

namespace metal {

// ---- reductions, prefix operations and shuffles ----

#define METALSIM_LANES(mask, lane) \
  for (uint rest = mask, lane = uint(__builtin_ctz(mask)); rest; \
       rest &= rest - 1, lane = rest ? uint(__builtin_ctz(rest)) : 0)

template <class T>
METALSIM_FN const T& metalsim_in(const metalsim::Call* c) {
  return *static_cast<const T*>(c->a);
}
template <class T>
METALSIM_FN T& metalsim_out(const metalsim::Call* c) {
  return *static_cast<T*>(c->out);
}

#define METALSIM_OPERATOR(name, T) \
  template <class T>               \
  METALSIM_NOINSTRUMENT void name(metalsim::Call* const* calls, uint mask)

#define METALSIM_COLLECTIVE(name, op)                                               \
  template <class T>                                                                \
  METALSIM_FN T name(T x, METALSIM_HERE) {                                          \
    T out;                                                                          \
    metalsim_collective(op<T>, #name, ms_file, ms_line, ms_column,                  \
                        metalsim::kOrders, &out, &x);                               \
    return out;                                                                     \
  }

#define METALSIM_REDUCTION(name, value)                                             \
  METALSIM_OPERATOR(metalsim_op_##name, T) {                                        \
    bool first = true;                                                              \
    T a{};                                                                          \
    METALSIM_LANES(mask, lane) {                                                    \
      T b = metalsim_in<T>(calls[lane]);                                            \
      a = first ? b : T(value);                                                     \
      first = false;                                                                \
    }                                                                               \
    METALSIM_LANES(mask, lane) metalsim_out<T>(calls[lane]) = a;                    \
  }                                                                                 \
  METALSIM_COLLECTIVE(name, metalsim_op_##name)
METALSIM_REDUCTION(simd_sum, a + b)
METALSIM_REDUCTION(simd_product, a* b)
METALSIM_REDUCTION(simd_max, max(a, b))
METALSIM_REDUCTION(simd_min, min(a, b))
METALSIM_REDUCTION(simd_and, a& b)
METALSIM_REDUCTION(simd_or, a | b)
METALSIM_REDUCTION(simd_xor, a ^ b)

#define METALSIM_PREFIX(name, start, value)                                         \
  METALSIM_OPERATOR(metalsim_op_inclusive_##name, T) {                              \
    T a = start;                                                                    \
    METALSIM_LANES(mask, lane) {                                                    \
      T b = metalsim_in<T>(calls[lane]);                                            \
      a = T(value);                                                                 \
      metalsim_out<T>(calls[lane]) = a;                                             \
    }                                                                               \
  }                                                                                 \
  METALSIM_OPERATOR(metalsim_op_exclusive_##name, T) {                              \
    T a = start;                                                                    \
    METALSIM_LANES(mask, lane) {                                                    \
      T b = metalsim_in<T>(calls[lane]);                                            \
      metalsim_out<T>(calls[lane]) = a;                                             \
      a = T(value);                                                                 \
    }                                                                               \
  }                                                                                 \
  METALSIM_COLLECTIVE(simd_prefix_inclusive_##name, metalsim_op_inclusive_##name)   \
  METALSIM_COLLECTIVE(simd_prefix_exclusive_##name, metalsim_op_exclusive_##name)
METALSIM_PREFIX(sum, T(0), a + b)
METALSIM_PREFIX(product, T(1), a* b)

// The lane that another reads from; its own, if that one is not there and nothing is checked.
METALSIM_FN uint metalsim_source(const metalsim::Call* c, uint mask, uint lane, uint self) {
  if (lane < 32 && (mask >> lane & 1)) return lane;
  metalsim_lane_fault(c, lane, self);
  return self;
}

#define METALSIM_SHUFFLE(name, from, has)                                           \
  METALSIM_OPERATOR(metalsim_op_##name, T) {                                        \
    METALSIM_LANES(mask, lane) {                                                    \
      const metalsim::Call* c = calls[lane];                                        \
      uint n = c->n;                                                                \
      uint source = metalsim_source(c, mask, (has) ? uint(from) : lane, lane);      \
      metalsim_out<T>(c) = metalsim_in<T>(calls[source]);                           \
    }                                                                               \
  }                                                                                 \
  template <class T>                                                                \
  METALSIM_FN T name(T x, ushort n, METALSIM_HERE) {                                \
    T out;                                                                          \
    metalsim_collective(metalsim_op_##name<T>, #name, ms_file, ms_line, ms_column,  \
                        metalsim::kOrders, &out, &x, nullptr, nullptr, n);          \
    return out;                                                                     \
  }
METALSIM_SHUFFLE(simd_shuffle, n, true)
METALSIM_SHUFFLE(simd_broadcast, n, true)
METALSIM_SHUFFLE(simd_shuffle_xor, lane ^ n, true)
METALSIM_SHUFFLE(simd_shuffle_down, lane + n, lane + n < 32)
METALSIM_SHUFFLE(simd_shuffle_up, lane - n, lane >= n)
METALSIM_SHUFFLE(simd_shuffle_rotate_down, (lane + n) % 32, true)
METALSIM_SHUFFLE(simd_shuffle_rotate_up, (lane + 32 - n % 32) % 32, true)
METALSIM_SHUFFLE(quad_shuffle, (lane & 28) + n, n < 4)
METALSIM_SHUFFLE(quad_shuffle_xor, lane ^ n, n < 4)
METALSIM_SHUFFLE(quad_broadcast, (lane & 28) + n, n < 4)

#define METALSIM_FILL(name, from, has, other)                                       \
  METALSIM_OPERATOR(metalsim_op_##name, T) {                                        \
    METALSIM_LANES(mask, lane) {                                                    \
      const metalsim::Call* c = calls[lane];                                        \
      uint n = c->n;                                                                \
      uint wanted = (has) ? uint(from) : uint(other);                               \
      uint source = metalsim_source(c, mask, wanted, lane);                         \
      metalsim_out<T>(c) = (has) ? metalsim_in<T>(calls[source])                    \
                                 : *static_cast<const T*>(calls[source]->b);        \
    }                                                                               \
  }                                                                                 \
  template <class T>                                                                \
  METALSIM_FN T name(T x, T filling, ushort n, METALSIM_HERE) {                     \
    T out;                                                                          \
    metalsim_collective(metalsim_op_##name<T>, #name, ms_file, ms_line, ms_column,  \
                        metalsim::kOrders, &out, &x, &filling, nullptr, n);         \
    return out;                                                                     \
  }
METALSIM_FILL(simd_shuffle_and_fill_down, lane + n, lane + n < 32, lane + n - 32)
METALSIM_FILL(simd_shuffle_and_fill_up, lane - n, lane >= n, lane + 32 - n)

METALSIM_OPERATOR(metalsim_op_first, T) {
  T a = metalsim_in<T>(calls[__builtin_ctz(mask)]);
  METALSIM_LANES(mask, lane) metalsim_out<T>(calls[lane]) = a;
}
METALSIM_COLLECTIVE(simd_broadcast_first, metalsim_op_first)

METALSIM_OPERATOR(metalsim_op_quad_sum, T) {
  METALSIM_LANES(mask, lane) {
    T a = T(0);
    METALSIM_LANES(mask & 15u << (lane & 28), other) a += metalsim_in<T>(calls[other]);
    metalsim_out<T>(calls[lane]) = a;
  }
}
METALSIM_COLLECTIVE(quad_sum, metalsim_op_quad_sum)

METALSIM_OPERATOR(metalsim_op_ballot, T) {
  ulong votes = 0;
  METALSIM_LANES(mask, lane) votes |= ulong(metalsim_in<T>(calls[lane])) << lane;
  METALSIM_LANES(mask, lane) {
    ulong* out = &metalsim_out<ulong>(calls[lane]);
    out[0] = votes;
    out[1] = mask;
  }
}
#define METALSIM_VOTE(type, name, value)                                            \
  METALSIM_FN type name(bool x, METALSIM_HERE) {                                    \
    ulong votes[2];                                                                 \
    metalsim_collective(metalsim_op_ballot<bool>, #name, ms_file, ms_line,          \
                        ms_column, metalsim::kOrders, votes, &x);                   \
    return value;                                                                   \
  }
struct simd_vote {
  typedef ulong vote_t;
  vote_t v;
  METALSIM_FN explicit operator vote_t() const { return v; }
  METALSIM_FN bool all() const { return v == 0xffffffff; }
  METALSIM_FN bool any() const { return v != 0; }
};
METALSIM_VOTE(bool, simd_any, votes[0] != 0)
METALSIM_VOTE(bool, simd_all, votes[0] == votes[1])
METALSIM_VOTE(simd_vote, simd_ballot, simd_vote{votes[0]})
METALSIM_FN bool simd_is_first(METALSIM_HERE) {
  return simd_broadcast_first(metalsim_lane(), ms_file, ms_line, ms_column) == metalsim_lane();
}

// ---- simdgroup_matrix: two elements a lane ----

template <class T, int Cols, int Rows = Cols>
struct simdgroup_matrix {
  static_assert(Cols == 8 && Rows == 8, "simdgroup_matrix is 8x8");
  typedef vec<T, 2> storage_type;
  storage_type elements;
  simdgroup_matrix() = default;
  METALSIM_FN explicit simdgroup_matrix(T diagonal) {
    int lane = int(metalsim_lane()), r = metalsim::row_of(lane), c = metalsim::column_of(lane);
    elements[0] = r == c ? diagonal : T(0);
    elements[1] = r == c + 1 ? diagonal : T(0);
  }
  METALSIM_FN storage_type& thread_elements() { return elements; }
  METALSIM_FN const storage_type& thread_elements() const { return elements; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat, 8, 8> simdgroup_bfloat8x8;

template <class T, int Cols, int Rows = Cols>
METALSIM_FN simdgroup_matrix<T, Cols, Rows> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, Cols, Rows> m;
  m.elements = value;
  return m;
}
template <class T, int Cols, int Rows = Cols>
METALSIM_FN simdgroup_matrix<T, Cols, Rows> make_diagonal_simdgroup_matrix(T value) {
  return simdgroup_matrix<T, Cols, Rows>(value);
}

METALSIM_FN void metalsim_whole(const char* name, const char* ms_file, unsigned ms_line,
                                unsigned ms_column) {
#ifdef METALSIM_CHECKED
  metalsim_collective(nullptr, name, ms_file, ms_line, ms_column,
                      metalsim::kMatrix);
#endif
}
template <class T>
METALSIM_FN void metalsim_touch(const T* p, bool write) {
#ifndef METALSIM_ADDRESS_SPACES
  metalsim_access(p, sizeof(T), write, true);
#endif
}
// Not instrumented: the accesses are announced as those of the whole SIMD-group.
template <class T>
METALSIM_NOINSTRUMENT T metalsim_peek(const T* p) {
  return *p;
}
template <class T>
METALSIM_NOINSTRUMENT void metalsim_poke(T* p, T value) {
  *p = value;
}

METALSIM_FN ulong metalsim_place(int r, int c, ulong stride, ulong2 origin, bool transpose) {
  return transpose ? (origin.y + ulong(c)) * stride + origin.x + ulong(r)
                   : (origin.y + ulong(r)) * stride + origin.x + ulong(c);
}

#ifdef METALSIM_ADDRESS_SPACES
#define METALSIM_LOAD_STORE(space)                                                          \
  template <class T>                                                                        \
  METALSIM_FN void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const space T* source,      \
                                  ulong elements_per_row = 8, ulong2 origin = 0,            \
                                  bool transpose = false) {}                                \
  template <class T>                                                                        \
  METALSIM_FN void simdgroup_store(simdgroup_matrix<T, 8, 8> m, space T* target,            \
                                   ulong elements_per_row = 8, ulong2 origin = 0,           \
                                   bool transpose = false) {}
METALSIM_LOAD_STORE(METALSIM_DEVICE)
METALSIM_LOAD_STORE(METALSIM_THREADGROUP)
#else
template <class T>
METALSIM_FN void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const T* source,
                                ulong elements_per_row = 8, ulong2 origin = 0,
                                bool transpose = false, METALSIM_HERE) {
  metalsim_whole("simdgroup_load", ms_file, ms_line, ms_column);
  int lane = int(metalsim_lane()), r = metalsim::row_of(lane), c = metalsim::column_of(lane);
  for (int i = 0; i < 2; ++i) {
    const T* p = source + metalsim_place(r, c + i, elements_per_row, origin, transpose);
    metalsim_touch(p, false);
    m.elements[i] = metalsim_peek(p);
  }
}
template <class T>
METALSIM_FN void simdgroup_store(simdgroup_matrix<T, 8, 8> m, T* target,
                                 ulong elements_per_row = 8, ulong2 origin = 0,
                                 bool transpose = false, METALSIM_HERE) {
  metalsim_whole("simdgroup_store", ms_file, ms_line, ms_column);
  int lane = int(metalsim_lane()), r = metalsim::row_of(lane), c = metalsim::column_of(lane);
  for (int i = 0; i < 2; ++i) {
    T* p = target + metalsim_place(r, c + i, elements_per_row, origin, transpose);
    metalsim_touch(p, true);
    metalsim_poke(p, T(m.elements[i]));
  }
}
#endif

template <class T>
METALSIM_FN void metalsim_gather(float* m, metalsim::Call* const* calls, const void* metalsim::Call::*p) {
  for (int lane = 0; lane < 32; ++lane) {
    auto& e = *static_cast<const vec<T, 2>*>(calls[lane]->*p);
    float* to = m + metalsim::row_of(lane) * 8 + metalsim::column_of(lane);
    to[0] = float(e[0]);
    to[1] = float(e[1]);
  }
}
template <class D, class A, class B, class C>
METALSIM_NOINSTRUMENT void metalsim_op_product(metalsim::Call* const* calls, uint mask) {
  if (mask != 0xffffffff) return;
  float a[64], b[64], c[64];
  metalsim_gather<A>(a, calls, &metalsim::Call::a);
  metalsim_gather<B>(b, calls, &metalsim::Call::b);
  if (calls[0]->c)
    metalsim_gather<C>(c, calls, &metalsim::Call::c);
  else
    __builtin_memset(c, 0, sizeof c);
  metalsim_product(c, a, b, c);
  for (int lane = 0; lane < 32; ++lane) {
    auto& e = metalsim_out<vec<D, 2>>(calls[lane]);
    const float* from = c + metalsim::row_of(lane) * 8 + metalsim::column_of(lane);
    e[0] = D(from[0]);
    e[1] = D(from[1]);
  }
}
template <class D, class A, class B, class C>
METALSIM_FN void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d,
                                               const simdgroup_matrix<A, 8, 8>& a,
                                               const simdgroup_matrix<B, 8, 8>& b,
                                               const simdgroup_matrix<C, 8, 8>& c, METALSIM_HERE) {
  metalsim_collective(metalsim_op_product<D, A, B, C>,
                      "simdgroup_multiply_accumulate", ms_file, ms_line,
                      ms_column,
                      metalsim::kOrders | metalsim::kMatrix | metalsim::kProduct,
                      &d.elements, &a.elements, &b.elements, &c.elements);
}
template <class D, class A, class B>
METALSIM_FN void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d,
                                    const simdgroup_matrix<A, 8, 8>& a,
                                    const simdgroup_matrix<B, 8, 8>& b, METALSIM_HERE) {
  metalsim_collective(metalsim_op_product<D, A, B, D>, "simdgroup_multiply",
                      ms_file, ms_line, ms_column,
                      metalsim::kOrders | metalsim::kMatrix | metalsim::kProduct,
                      &d.elements, &a.elements, &b.elements);
}

// ---- atomics ----

enum memory_order { memory_order_relaxed };

#ifdef METALSIM_ADDRESS_SPACES
template <class T>
using atomic = T;
#else
template <class T>
struct atomic {
  T value;
};
#endif
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;

#ifdef METALSIM_ADDRESS_SPACES
#define METALSIM_ATOMIC(name, reads, expression)                                                  \
  template <class T>                                                                       \
  METALSIM_FN T name(METALSIM_DEVICE atomic<T>*, T, memory_order) { return T(); }          \
  template <class T>                                                                       \
  METALSIM_FN T name(METALSIM_THREADGROUP atomic<T>*, T, memory_order) { return T(); }
template <class T>
METALSIM_FN T atomic_load_explicit(const METALSIM_DEVICE atomic<T>*, memory_order) { return T(); }
template <class T>
METALSIM_FN T atomic_load_explicit(const METALSIM_THREADGROUP atomic<T>*, memory_order) {
  return T();
}
#else
// Taken as one access by the checks, and atomic between the processes that share a buffer.
template <class T, class F>
METALSIM_NOINSTRUMENT T metalsim_update(T* p, F next) {
  static_assert(sizeof(T) == 4, "atomics of 32 bits");
  uint* bits = reinterpret_cast<uint*>(p);
  uint old = metalsim_replace(bits, 0, 0);
  while (true) {
    uint seen = metalsim_replace(bits, old, as_type<uint>(next(as_type<T>(old))));
    if (seen == old) return as_type<T>(old);
    old = seen;
  }
}
#define METALSIM_ATOMIC(name, reads, expression)                                                  \
  template <class T>                                                                       \
  METALSIM_FN T name(atomic<T>* p, T x, memory_order) {                                    \
    metalsim_atomic(p, sizeof(T), reads);                                                 \
    return metalsim_update(&p->value, [x](T old) { return T(expression); });               \
  }
template <class T>
METALSIM_FN T atomic_load_explicit(const atomic<T>* p, memory_order) {
  metalsim_atomic(p, sizeof(T), true);
  return metalsim_update(&const_cast<atomic<T>*>(p)->value, [](T old) { return old; });
}
#endif
METALSIM_ATOMIC(atomic_fetch_add_explicit, true, old + x)
METALSIM_ATOMIC(atomic_fetch_sub_explicit, true, old - x)
METALSIM_ATOMIC(atomic_fetch_max_explicit, true, old < x ? x : old)
METALSIM_ATOMIC(atomic_fetch_min_explicit, true, x < old ? x : old)
METALSIM_ATOMIC(atomic_fetch_or_explicit, true, old | x)
METALSIM_ATOMIC(atomic_fetch_and_explicit, true, old & x)
METALSIM_ATOMIC(atomic_exchange_explicit, true, ((void)old, x))
METALSIM_ATOMIC(atomic_store_explicit, false, ((void)old, x))

}  // namespace metal
