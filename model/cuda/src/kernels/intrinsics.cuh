// Operations that CUDA C lacks without the toolkit's headers: number formats, tensor cores, and asynchronous copies.
//
// Only this file has inline PTX. The emulator has a file of the same name with the same functions in plain C++.
#pragma once

#define DEVICE __device__ __forceinline__

// Declares `unsigned char name[]`: shared memory of the size that the launch requests.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

// Every kernel calls this first. It allows the next kernel in the stream to start, whose threads proceed to this point,
// and waits until the earlier kernels are done. So starting a kernel takes no extra time (on Hopper and later).
DEVICE void begin_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Prefetches the 128 bytes around an address into the L2 cache.
DEVICE void prefetch(const void *address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

// Rounds to bfloat16, to nearest with ties to even.
DEVICE unsigned short bf16_from_float(float x) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Rounds two numbers to bfloat16. `low` gets the lower address.
DEVICE unsigned bf16x2_from_floats(float low, float high) {
    unsigned bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

// Rounds to IEEE half precision, to nearest with ties to even.
DEVICE unsigned short f16_from_float(float x) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

DEVICE float f16_to_float(unsigned short bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

// 2^x with an error of about 2 ulp, and 0 for -infinity.
DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// d += a · b for tiles [16, 16] and [16, 8] of bfloat16, distributed over a warp as PTX defines for mma.m16n8k16.
DEVICE void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads four tiles [8, 8] of 16 bits from shared memory. Lane l passes the address of row l % 8 of tile l / 8.
DEVICE void load_tiles(unsigned (&tiles)[4], const void *row) {
    unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(address)
                 : "memory");
}

// Like load_tiles, with each tile transposed.
DEVICE void load_tiles_transposed(unsigned (&tiles)[4], const void *row) {
    unsigned address = (unsigned)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
                 : "r"(address)
                 : "memory");
}

// Begins to copy 16 bytes from global to shared memory, or zeros if not `valid`. Both addresses are multiples of 16.
DEVICE void copy_async(void *shared, const void *global, bool valid) {
    unsigned address = (unsigned)__cvta_generic_to_shared(shared);
    int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(bytes) : "memory");
}

// Ends a group of copies.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the newest `N` groups of this thread's copies are done.
template <int N>
DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
