// Number formats, loads and stores, and sums over threads. Every kernel is compiled for one format of activations,
// `ACTIVATION`, and loads `VEC` of them at once: 16 bytes if all widths and offsets allow it, or else a single number.
#pragma once

#include "intrinsics.cuh"

#ifndef ACTIVATION
#define ACTIVATION float
#endif
#ifndef VEC
#define VEC 1
#endif

struct bf16 {
    unsigned short bits;
};

struct f16 {
    unsigned short bits;
};

typedef ACTIVATION act;

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;
// A target that is not counted.
constexpr unsigned IGNORE = 0xffffffffu;

DEVICE float negative_infinity() { return __uint_as_float(0xff800000u); }

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
DEVICE float to_float(f16 x) { return f16_to_float(x.bits); }

DEVICE void put(float &to, float x) { to = x; }
DEVICE void put(bf16 &to, float x) { to.bits = bf16_from_float(x); }
DEVICE void put(f16 &to, float x) { to.bits = f16_from_float(x); }

// The memory of adjacent numbers.
template <int BYTES>
struct Chunk;
template <>
struct Chunk<2> {
    unsigned short word;
};
template <>
struct Chunk<4> {
    unsigned word;
};
template <>
struct Chunk<8> {
    uint2 word;
};
template <>
struct Chunk<16> {
    uint4 word;
};

// Loads `N` numbers from an address that is a multiple of their total size, or of 16 bytes.
template <int N, class T>
DEVICE void load(float (&to)[N], const T *from) {
    constexpr int BYTES = N * sizeof(T) < 16 ? N * sizeof(T) : 16;
    constexpr int COUNT = BYTES / sizeof(T);
#pragma unroll
    for (int at = 0; at < N; at += COUNT) {
        union {
            Chunk<BYTES> chunk;
            T numbers[COUNT];
        } raw;
        raw.chunk = *reinterpret_cast<const Chunk<BYTES> *>(from + at);
#pragma unroll
        for (int i = 0; i < COUNT; i++) to[at + i] = to_float(raw.numbers[i]);
    }
}

// Stores `N` numbers, rounded to the format in memory.
template <int N, class T>
DEVICE void store(T *to, const float (&from)[N]) {
    constexpr int BYTES = N * sizeof(T) < 16 ? N * sizeof(T) : 16;
    constexpr int COUNT = BYTES / sizeof(T);
#pragma unroll
    for (int at = 0; at < N; at += COUNT) {
        union {
            Chunk<BYTES> chunk;
            T numbers[COUNT];
        } raw;
#pragma unroll
        for (int i = 0; i < COUNT; i++) put(raw.numbers[i], from[at + i]);
        *reinterpret_cast<Chunk<BYTES> *>(to + at) = raw.chunk;
    }
}

// Sums over aligned groups of `LANES` lanes. Every lane gets the sum, with the same bits.
template <int LANES>
DEVICE float lanes_sum(float x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

template <int LANES>
DEVICE float lanes_max(float x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// Sums over groups of `THREADS` threads in a block of `GROUPS` groups. All threads must call it. `shared` must have
// `GROUPS * THREADS / WARP` elements.
template <int THREADS, int GROUPS>
DEVICE float group_sum(float x, float *shared) {
    x = lanes_sum<WARP>(x);
    constexpr int OWN_WARPS = THREADS / WARP;
    __syncthreads();
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    const float *own = shared + threadIdx.x / THREADS * OWN_WARPS;
    float total = own[0];
#pragma unroll
    for (int warp = 1; warp < OWN_WARPS; warp++) total += own[warp];
    return total;
}
