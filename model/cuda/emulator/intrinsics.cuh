// Operations that CUDA C lacks without the toolkit's headers, in plain C++ for the emulator: number formats, tensor
// cores, and asynchronous copies. The file of the same name among the kernels has the same functions for the device.
#pragma once

#define DEVICE __device__ __forceinline__

// Declares `unsigned char name[]`: shared memory of the size that the launch requests.
#define DYNAMIC_SHARED(name) unsigned char *const name = ulmus_thread->dynamic_shared

// The emulator runs kernels one after the other, so there is nothing to wait for.
DEVICE void begin_kernel() {}

DEVICE void prefetch(const void *) {}

// Rounds to bfloat16, to nearest with ties to even.
DEVICE unsigned short bf16_from_float(float x) {
    unsigned bits = __float_as_uint(x);
    if (x != x) return 0x7FFF;
    return (unsigned short)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Rounds two numbers to bfloat16. `low` gets the lower address.
DEVICE unsigned bf16x2_from_floats(float low, float high) {
    return bf16_from_float(low) | (unsigned)bf16_from_float(high) << 16;
}

// Rounds to IEEE half precision, to nearest with ties to even.
DEVICE unsigned short f16_from_float(float x) {
    typedef float Floats __attribute__((vector_size(16)));
    if (x != x) return 0x7FFF;
    return (unsigned short)__builtin_ia32_vcvtps2ph(Floats{x}, 0)[0];
}

DEVICE float f16_to_float(unsigned short bits) {
    typedef short Halves __attribute__((vector_size(16)));
    return __builtin_ia32_vcvtph2ps(Halves{(short)bits})[0];
}

// 2^x with an error of about 2 ulp, and 0 for -infinity. Subnormal numbers become 0, as on the device.
DEVICE float exp2_fast(float x) {
    float y = exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}

namespace ulmus {

DEVICE float low_bf16(unsigned pair) { return __uint_as_float(pair << 16); }
DEVICE float high_bf16(unsigned pair) { return __uint_as_float(pair & 0xFFFF0000u); }

// Lane l, with g = l / 4 and t = l % 4, has these parts of the tiles: a[i] holds the columns 2t and 2t + 1 of row g,
// but 8 rows further down for odd i, and 8 columns further right for i >= 2. b[i] holds the rows 2t and 2t + 1 of
// column g, but 8 rows further down for i = 1. d holds the columns 2t and 2t + 1 of row g, and then of row g + 8.
struct Mma {
    float (&d)[4];
    const unsigned (&a)[4];
    const unsigned (&b)[2];

    // Products are exact, and sums are computed in double precision and rounded once.
    static __noinline__ void combine(void *const *lanes, unsigned) {
        typedef double Half __attribute__((vector_size(32))); // of a row of eight
        alignas(32) double a[16][16], b[16][8], d[16][8];
        for (int lane = 0; lane < 32; lane++) {
            const Mma &own = *static_cast<const Mma *>(lanes[lane]);
            int g = lane / 4, t = lane % 4 * 2;
            for (int i = 0; i < 4; i++) {
                a[g + i % 2 * 8][t + i / 2 * 8] = low_bf16(own.a[i]);
                a[g + i % 2 * 8][t + i / 2 * 8 + 1] = high_bf16(own.a[i]);
                d[g + i / 2 * 8][t + i % 2] = own.d[i];
            }
            for (int i = 0; i < 2; i++) {
                b[t + 8 * i][g] = low_bf16(own.b[i]);
                b[t + 8 * i + 1][g] = high_bf16(own.b[i]);
            }
        }
        for (int row = 0; row < 16; row++) {
            Half *sums = reinterpret_cast<Half *>(d[row]);
            Half low = sums[0], high = sums[1];
            for (int k = 0; k < 16; k++) {
                const Half *factors = reinterpret_cast<const Half *>(b[k]);
                low += a[row][k] * factors[0];
                high += a[row][k] * factors[1];
            }
            sums[0] = low;
            sums[1] = high;
        }
        for (int lane = 0; lane < 32; lane++) {
            const Mma &own = *static_cast<const Mma *>(lanes[lane]);
            for (int i = 0; i < 4; i++) own.d[i] = (float)d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
        }
    }
};

template <bool TRANSPOSED>
struct Tiles {
    unsigned (&tiles)[4];
    const void *row;

    static __noinline__ void combine(void *const *lanes, unsigned) {
        for (unsigned tile = 0; tile < 4; tile++) {
            const unsigned short *rows[8];
            for (unsigned i = 0; i < 8; i++)
                rows[i] = static_cast<const unsigned short *>(static_cast<Tiles *>(lanes[8 * tile + i])->row);
            for (unsigned lane = 0; lane < 32; lane++) {
                unsigned g = lane / 4, t = lane % 4 * 2;
                unsigned low = TRANSPOSED ? rows[t][g] : rows[g][t];
                unsigned high = TRANSPOSED ? rows[t + 1][g] : rows[g][t + 1];
                static_cast<Tiles *>(lanes[lane])->tiles[tile] = low | high << 16;
            }
        }
    }

    void load(const char *operation) {
        if ((size_t)row % 16 != 0) ulmus_thread->services->fail("a row of load_tiles is not aligned to 16 bytes");
        collective(operation, ~0u, combine, this);
    }
};

} // namespace ulmus

// d += a · b for tiles [16, 16] and [16, 8] of bfloat16, distributed over a warp as PTX defines for mma.m16n8k16.
DEVICE void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    ulmus::Mma arguments = {d, a, b};
    ulmus::collective("mma_bf16", ~0u, ulmus::Mma::combine, &arguments);
}

// Loads four tiles [8, 8] of 16 bits from shared memory. Lane l passes the address of row l % 8 of tile l / 8.
DEVICE void load_tiles(unsigned (&tiles)[4], const void *row) { ulmus::Tiles<false>{tiles, row}.load("load_tiles"); }

// Like load_tiles, with each tile transposed.
DEVICE void load_tiles_transposed(unsigned (&tiles)[4], const void *row) {
    ulmus::Tiles<true>{tiles, row}.load("load_tiles_transposed");
}

// Begins to copy 16 bytes from global to shared memory, or zeros if not `valid`. Both addresses are multiples of 16.
DEVICE void copy_async(void *shared, const void *global, bool valid) {
    ulmus_thread->services->copy_begin(*ulmus_thread, shared, global, valid);
}

// Ends a group of copies.
DEVICE void copy_async_commit() { ulmus_thread->services->copy_commit(*ulmus_thread); }

// Waits until all but the newest `N` groups of this thread's copies are done.
template <int N>
DEVICE void copy_async_wait() {
    ulmus_thread->services->copy_wait(*ulmus_thread, N);
}
