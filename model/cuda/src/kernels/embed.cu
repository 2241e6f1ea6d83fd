// The embedding, and its gradient, which is summed in the order of the rows.
#include "common.cuh"

constexpr int THREADS = 128;

// out[r] = table[ids[r]], with a block per row. TABLE: format of the table.
extern "C" __global__ void __launch_bounds__(THREADS)
    embed(act *out, const TABLE *table, const unsigned *ids, int width) {
    begin_kernel();
    const TABLE *from = table + (size_t)ids[blockIdx.x] * width;
    act *to = out + (size_t)blockIdx.x * width;
    for (int column = threadIdx.x * VEC; column < width; column += THREADS * VEC) {
        float x[VEC];
        load(x, from + column);
        store(to + column, x);
    }
}

// table_gradient[ids[r]] += gradient[r], with a block per row. The block of the first row with an id adds all rows with
// that id.
extern "C" __global__ void __launch_bounds__(THREADS)
    embed_backward(float *table_gradient, const act *gradient, const unsigned *ids, int rows, int width) {
    begin_kernel();
    __shared__ int matches[THREADS];
    __shared__ int counts[THREADS / WARP];
    unsigned id = ids[blockIdx.x];
    for (int start = 0; start < blockIdx.x; start += THREADS) {
        int row = start + threadIdx.x;
        if (__syncthreads_or(row < blockIdx.x && ids[row] == id)) return;
    }
    float *into = table_gradient + (size_t)id * width;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int start = blockIdx.x; start < rows; start += THREADS) {
        int row = start + threadIdx.x;
        unsigned found = __ballot_sync(ALL_LANES, row < rows && ids[row] == id);
        if (lane == 0) counts[warp] = __popc(found);
        __syncthreads();
        int before = 0, total = 0;
        for (int w = 0; w < THREADS / WARP; w++) {
            if (w < warp) before += counts[w];
            total += counts[w];
        }
        if (found >> lane & 1) matches[before + __popc(found & ((1u << lane) - 1))] = row;
        __syncthreads();
        if (total > 0)
            for (int column = threadIdx.x * VEC; column < width; column += THREADS * VEC) {
                float sum[VEC], own[VEC];
                load(sum, into + column);
                for (int match = 0; match < total; match++) {
                    load(own, gradient + (size_t)matches[match] * width + column);
#pragma unroll
                    for (int i = 0; i < VEC; i++) sum[i] += own[i];
                }
                store(into + column, sum);
            }
        __syncthreads();
    }
}
