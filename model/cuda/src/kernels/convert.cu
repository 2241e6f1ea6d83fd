// Converts numbers from one format to another.
//
// FROM, TO: the formats.
#include "common.cuh"

extern "C" __global__ void convert(TO *to, const FROM *from, long long len) {
    begin_kernel();
    long long at = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (at >= len) return;
    float x[VEC];
    load(x, from + at);
    store(to + at, x);
}
