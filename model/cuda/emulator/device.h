// The part of CUDA C++ that our kernels use, for a C++ compiler. This file is included before every kernel source.
//
// A warp's operations pass their arguments to the scheduler, which executes them when all lanes have arrived.
#pragma once

#include "abi.h"

register ulmus::Thread *ulmus_thread asm("r15");

#define __CUDACC__ 1
#define __CUDACC_RTC__ 1
#define __CUDA_ARCH__ 900

// __global__ and __launch_bounds__ are not defined here, because kernels are found by them in the preprocessed text.
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_assume(condition)
// A CPU thread runs one block at a time.
#define __shared__ static thread_local

#define threadIdx (static_cast<const ulmus::Index &>(ulmus_thread->thread_index))
#define blockIdx (static_cast<const ulmus::Index &>(ulmus_thread->block_index))
#define blockDim (static_cast<const ulmus::Index &>(ulmus_thread->block_size))
#define gridDim (static_cast<const ulmus::Index &>(ulmus_thread->grid_size))
constexpr int warpSize = 32;

using size_t = __SIZE_TYPE__;

// ---- vectors

#define ULMUS_VECTOR2(name, T, bytes)                                                                                  \
    struct alignas(bytes) name {                                                                                       \
        T x, y;                                                                                                        \
    };                                                                                                                 \
    constexpr name make_##name(T x, T y) { return {x, y}; }
#define ULMUS_VECTOR3(name, T)                                                                                         \
    struct name {                                                                                                      \
        T x, y, z;                                                                                                     \
    };                                                                                                                 \
    constexpr name make_##name(T x, T y, T z) { return {x, y, z}; }
#define ULMUS_VECTOR4(name, T, bytes)                                                                                  \
    struct alignas(bytes) name {                                                                                       \
        T x, y, z, w;                                                                                                  \
    };                                                                                                                 \
    constexpr name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
#define ULMUS_VECTORS(name, T, bytes)                                                                                  \
    ULMUS_VECTOR2(name##2, T, 2 * bytes)                                                                               \
    ULMUS_VECTOR3(name##3, T)                                                                                          \
    ULMUS_VECTOR4(name##4, T, (4 * bytes < 16 ? 4 * bytes : 16))

ULMUS_VECTORS(char, signed char, 1)
ULMUS_VECTORS(uchar, unsigned char, 1)
ULMUS_VECTORS(short, short, 2)
ULMUS_VECTORS(ushort, unsigned short, 2)
ULMUS_VECTORS(int, int, 4)
ULMUS_VECTORS(uint, unsigned, 4)
ULMUS_VECTORS(float, float, 4)
ULMUS_VECTORS(longlong, long long, 8)
ULMUS_VECTORS(ulonglong, unsigned long long, 8)
ULMUS_VECTORS(double, double, 8)

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr dim3(ulmus::Index index) : x(index.x), y(index.y), z(index.z) {}
};

// ---- bits

namespace ulmus {

template <class To, class From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

} // namespace ulmus

inline unsigned __float_as_uint(float x) { return ulmus::bits_as<unsigned>(x); }
inline int __float_as_int(float x) { return ulmus::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return ulmus::bits_as<float>(x); }
inline float __int_as_float(int x) { return ulmus::bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return ulmus::bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return ulmus::bits_as<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c += (signed char)(a >> i) * (signed char)(b >> i);
    return c;
}

template <class T>
inline T __ldg(const T *address) {
    return *address;
}

inline long long clock64() { return __builtin_ia32_rdtsc(); }

// ---- mathematics

#define ULMUS_UNARY(name)                                                                                              \
    extern "C" double name(double);                                                                                    \
    extern "C" float name##f(float);                                                                                   \
    inline float name(float x) { return name##f(x); }
#define ULMUS_BINARY(name)                                                                                             \
    extern "C" double name(double, double);                                                                            \
    extern "C" float name##f(float, float);                                                                            \
    inline float name(float x, float y) { return name##f(x, y); }

ULMUS_UNARY(sqrt)
ULMUS_UNARY(cbrt)
ULMUS_UNARY(exp)
ULMUS_UNARY(exp2)
ULMUS_UNARY(expm1)
ULMUS_UNARY(log)
ULMUS_UNARY(log2)
ULMUS_UNARY(log10)
ULMUS_UNARY(log1p)
ULMUS_UNARY(sin)
ULMUS_UNARY(cos)
ULMUS_UNARY(tanh)
ULMUS_UNARY(erf)
ULMUS_UNARY(fabs)
ULMUS_UNARY(floor)
ULMUS_UNARY(ceil)
ULMUS_UNARY(trunc)
ULMUS_UNARY(round)
ULMUS_UNARY(rint)
ULMUS_UNARY(nearbyint)
ULMUS_BINARY(pow)
ULMUS_BINARY(fmod)
ULMUS_BINARY(fmax)
ULMUS_BINARY(fmin)
ULMUS_BINARY(copysign)
extern "C" double fma(double, double, double);
extern "C" float fmaf(float, float, float);
inline float fma(float x, float y, float z) { return fmaf(x, y, z); }
extern "C" void sincosf(float, float *, float *);
extern "C" void sincos(double, double *, double *);
extern "C" double ldexp(double, int);
extern "C" float ldexpf(float, int);
extern "C" int abs(int);
extern "C" long long llabs(long long);
inline float abs(float x) { return fabsf(x); }
inline double abs(double x) { return fabs(x); }
inline bool isnan(float x) { return x != x; }
inline bool isnan(double x) { return x != x; }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isinf(double x) { return __builtin_isinf(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isfinite(double x) { return __builtin_isfinite(x); }
inline bool signbit(float x) { return __builtin_signbit(x); }
inline bool signbit(double x) { return __builtin_signbit(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return (float)(1.0 / sqrt((double)x)); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline double __dsqrt_rn(double x) { return sqrt(x); }
inline double __ddiv_rn(double x, double y) { return x / y; }
inline double __drcp_rn(double x) { return 1.0 / x; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline double __dsub_rn(double x, double y) { return x - y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }

namespace ulmus {

// Converts to an integer like the device: clamps to the nearest one, with 0 for NaN.
template <class T, class F>
inline T to_integer(F x) {
    constexpr bool is_signed = T(-1) < T(0);
    constexpr T lowest = is_signed ? T(1) << (sizeof(T) * 8 - 1) : T(0), highest = ~lowest;
    if (x != x) return 0;
    if (x <= (F)lowest) return lowest;
    if (x >= (F)highest) return highest;
    return (T)x;
}

} // namespace ulmus

inline long long __double2ll_rn(double x) { return ulmus::to_integer<long long>(rint(x)); }
inline long long __double2ll_rz(double x) { return ulmus::to_integer<long long>(x); }
inline int __double2int_rn(double x) { return ulmus::to_integer<int>(rint(x)); }
inline int __double2int_rz(double x) { return ulmus::to_integer<int>(x); }
inline int __float2int_rn(float x) { return ulmus::to_integer<int>(rintf(x)); }
inline int __float2int_rz(float x) { return ulmus::to_integer<int>(x); }
inline int __float2int_rd(float x) { return ulmus::to_integer<int>(floorf(x)); }
inline int __float2int_ru(float x) { return ulmus::to_integer<int>(ceilf(x)); }
inline unsigned __float2uint_rn(float x) { return ulmus::to_integer<unsigned>(rintf(x)); }
inline unsigned __float2uint_rz(float x) { return ulmus::to_integer<unsigned>(x); }
inline long long __float2ll_rn(float x) { return ulmus::to_integer<long long>(rintf(x)); }
inline double __ll2double_rn(long long x) { return (double)x; }
inline double __ull2double_rn(unsigned long long x) { return (double)x; }
inline double __int2double_rn(int x) { return x; }
inline double __uint2double_rn(unsigned x) { return x; }
inline float __int2float_rn(int x) { return (float)x; }
inline float __uint2float_rn(unsigned x) { return (float)x; }
inline float __ll2float_rn(long long x) { return (float)x; }
inline float __double2float_rn(double x) { return (float)x; }

// Minimum and maximum of numbers of one or two types, which are NaN only if both numbers are.
template <class A, class B>
constexpr auto min(A a, B b) -> decltype(a + b) {
    decltype(a + b) x = a, y = b;
    return x != x || y < x ? y : x;
}

template <class A, class B>
constexpr auto max(A a, B b) -> decltype(a + b) {
    decltype(a + b) x = a, y = b;
    return x != x || y > x ? y : x;
}

// ---- atomic operations: blocks run on several CPU threads

namespace ulmus {

// Replaces the number at `address` by a function of it, and returns the old number.
template <class T, class F>
inline T atomic_update(T *address, F function) {
    T old, next;
    __atomic_load(address, &old, __ATOMIC_SEQ_CST);
    do next = function(old);
    while (!__atomic_compare_exchange(address, &old, &next, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
    return old;
}

template <class T>
struct Same {
    using Type = T;
};

} // namespace ulmus

template <class T>
inline T atomicAdd(T *address, typename ulmus::Same<T>::Type x) {
    return ulmus::atomic_update(address, [x](T old) { return T(old + x); });
}

template <class T>
inline T atomicSub(T *address, typename ulmus::Same<T>::Type x) {
    return ulmus::atomic_update(address, [x](T old) { return T(old - x); });
}

template <class T>
inline T atomicMax(T *address, typename ulmus::Same<T>::Type x) {
    return ulmus::atomic_update(address, [x](T old) { return old < x ? x : old; });
}

template <class T>
inline T atomicMin(T *address, typename ulmus::Same<T>::Type x) {
    return ulmus::atomic_update(address, [x](T old) { return x < old ? x : old; });
}

template <class T>
inline T atomicOr(T *address, typename ulmus::Same<T>::Type x) {
    return __atomic_fetch_or(address, x, __ATOMIC_SEQ_CST);
}

template <class T>
inline T atomicAnd(T *address, typename ulmus::Same<T>::Type x) {
    return __atomic_fetch_and(address, x, __ATOMIC_SEQ_CST);
}

template <class T>
inline T atomicXor(T *address, typename ulmus::Same<T>::Type x) {
    return __atomic_fetch_xor(address, x, __ATOMIC_SEQ_CST);
}

template <class T>
inline T atomicExch(T *address, typename ulmus::Same<T>::Type x) {
    T old;
    __atomic_exchange(address, &x, &old, __ATOMIC_SEQ_CST);
    return old;
}

template <class T>
inline T atomicCAS(T *address, typename ulmus::Same<T>::Type expected, typename ulmus::Same<T>::Type x) {
    __atomic_compare_exchange(address, &expected, &x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ---- barriers and operations of a warp

namespace ulmus {

inline unsigned block_barrier(const char *operation, bool predicate) {
    return ulmus_thread->services->block_barrier(*ulmus_thread, operation, predicate);
}

inline void collective(const char *operation, unsigned mask, Combine combine, void *arguments) {
    ulmus_thread->services->collective(*ulmus_thread, operation, mask, combine, arguments);
}

// Calls a function for each lane of a set.
template <class F>
inline void each_lane(unsigned mask, F function) {
    for (; mask != 0; mask &= mask - 1) function((unsigned)__builtin_ctz(mask));
}

template <class T>
struct Shuffle {
    T value;
    unsigned source;
    T result;

    static void combine(void *const *lanes, unsigned mask) {
        each_lane(mask, [&](unsigned lane) {
            Shuffle &own = *static_cast<Shuffle *>(lanes[lane]);
            // The value of a lane that does not take part is undefined, so it is NaN.
            if (mask >> own.source & 1)
                own.result = static_cast<Shuffle *>(lanes[own.source])->value;
            else
                __builtin_memset(&own.result, 0xFF, sizeof own.result);
        });
    }
};

template <class T>
inline T shuffle(const char *operation, unsigned mask, T value, unsigned source) {
    Shuffle<T> arguments = {value, source, value};
    collective(operation, mask, Shuffle<T>::combine, &arguments);
    return arguments.result;
}

struct Vote {
    bool predicate;
    unsigned result;

    static void combine(void *const *lanes, unsigned mask) {
        unsigned result = 0;
        each_lane(mask, [&](unsigned lane) {
            if (static_cast<Vote *>(lanes[lane])->predicate) result |= 1u << lane;
        });
        each_lane(mask, [&](unsigned lane) { static_cast<Vote *>(lanes[lane])->result = result; });
    }
};

inline unsigned vote(const char *operation, unsigned mask, bool predicate) {
    Vote arguments = {predicate, 0};
    collective(operation, mask, Vote::combine, &arguments);
    return arguments.result;
}

// An operation that combines the numbers of all lanes, and returns the result to each of them.
template <class T, T (*F)(T, T)>
struct Reduction {
    static void combine(void *const *lanes, unsigned mask) {
        T result = *static_cast<T *>(lanes[__builtin_ctz(mask)]);
        each_lane(mask & (mask - 1), [&](unsigned lane) { result = F(result, *static_cast<T *>(lanes[lane])); });
        each_lane(mask, [&](unsigned lane) { *static_cast<T *>(lanes[lane]) = result; });
    }
};

template <class T, T (*F)(T, T)>
inline T reduce(const char *operation, unsigned mask, T value) {
    collective(operation, mask, Reduction<T, F>::combine, &value);
    return value;
}

template <class T>
inline T sum_of(T a, T b) {
    return a + b;
}

template <class T>
inline T lesser(T a, T b) {
    return b < a ? b : a;
}

template <class T>
inline T greater(T a, T b) {
    return a < b ? b : a;
}

inline void nothing(void *const *, unsigned) {}

} // namespace ulmus

inline void __syncthreads() { ulmus::block_barrier("__syncthreads", false); }
inline int __syncthreads_or(int predicate) { return ulmus::block_barrier("__syncthreads_or", predicate != 0) != 0; }
inline int __syncthreads_and(int predicate) { return ulmus::block_barrier("__syncthreads_and", predicate == 0) == 0; }
inline int __syncthreads_count(int predicate) { return ulmus::block_barrier("__syncthreads_count", predicate != 0); }

inline void __syncwarp(unsigned mask = ~0u) { ulmus::collective("__syncwarp", mask, ulmus::nothing, nullptr); }

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    unsigned segment = ulmus_thread->lane & ~(width - 1u);
    return ulmus::shuffle("__shfl_sync", mask, value, segment | (source & (width - 1u)));
}

template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned lane = ulmus_thread->lane, position = lane & (width - 1u);
    return ulmus::shuffle("__shfl_up_sync", mask, value, position < delta ? lane : lane - delta);
}

template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    unsigned lane = ulmus_thread->lane, position = lane & (width - 1u);
    return ulmus::shuffle("__shfl_down_sync", mask, value, position + delta >= (unsigned)width ? lane : lane + delta);
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
    unsigned lane = ulmus_thread->lane, source = lane ^ lane_mask, last = lane | (width - 1u);
    return ulmus::shuffle("__shfl_xor_sync", mask, value, source > last ? lane : source);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return ulmus::vote("__ballot_sync", mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) { return ulmus::vote("__any_sync", mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return ulmus::vote("__all_sync", mask, predicate == 0) == 0; }

inline unsigned __reduce_add_sync(unsigned mask, unsigned x) {
    return ulmus::reduce<unsigned, ulmus::sum_of>("__reduce_add_sync", mask, x);
}
inline int __reduce_add_sync(unsigned mask, int x) {
    return ulmus::reduce<int, ulmus::sum_of>("__reduce_add_sync", mask, x);
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned x) {
    return ulmus::reduce<unsigned, ulmus::lesser>("__reduce_min_sync", mask, x);
}
inline int __reduce_min_sync(unsigned mask, int x) {
    return ulmus::reduce<int, ulmus::lesser>("__reduce_min_sync", mask, x);
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned x) {
    return ulmus::reduce<unsigned, ulmus::greater>("__reduce_max_sync", mask, x);
}
inline int __reduce_max_sync(unsigned mask, int x) {
    return ulmus::reduce<int, ulmus::greater>("__reduce_max_sync", mask, x);
}

inline void __trap() { ulmus_thread->services->fail("__trap"); }

// ---- what the driver calls

namespace ulmus {

template <auto>
struct Caller;

template <class... T, void (*KERNEL)(T...)>
struct Caller<KERNEL> {
    static constexpr unsigned SIZES[sizeof...(T) + 1] = {sizeof(T)...};

    template <int... I>
    struct Numbers {};

    template <int... I>
    static void call_with(void *const *parameters, Numbers<I...>) {
        KERNEL(*static_cast<T *>(parameters[I])...);
    }

    static void call(void *const *parameters) { call_with(parameters, Numbers<__integer_pack(sizeof...(T))...>()); }

    static constexpr Kernel describe(unsigned max_threads) { return {call, SIZES, sizeof...(T), max_threads}; }
};

static thread_local char shared_anchor;

} // namespace ulmus

// All thread-local storage of a module is shared memory. This returns its address to the driver.
extern "C" __attribute__((visibility("default"))) void *ulmus_shared_anchor() { return &ulmus::shared_anchor; }
