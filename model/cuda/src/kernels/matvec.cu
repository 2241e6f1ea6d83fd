// Products of an inference model's matrices and a few rows, which decoding consists of. A warp computes OUTPUTS
// outputs, and reads their weights once for all rows. A result has the same bits for any supported number of rows.
//
// WEIGHTS: WEIGHTS_F32, _F16, _BF16 or _Q8_0. ROWS: number of rows. RESULT: format of the results. LOADS: weights that
// a lane loads at once, either 1 or 16 bytes of them.
#include "common.cuh"

#define WEIGHTS_F32 1
#define WEIGHTS_F16 2
#define WEIGHTS_BF16 3
#define WEIGHTS_Q8_0 4

constexpr int WARPS = 4;
constexpr int OUTPUTS = ROWS > 4 ? 1 : 2;
// Number of inputs that share a scale in q8_0.
constexpr int BLOCK = 32;

#if WEIGHTS == WEIGHTS_Q8_0
struct Weights {
    const signed char *values;
    const f16 *scales;

    DEVICE void get(float (&to)[LOADS], int output, int inputs, int column) const {
        union {
            Chunk<LOADS == 16 ? 16 : 4> chunk;
            signed char values[LOADS == 16 ? 16 : 4];
        } raw;
        const signed char *from = values + (size_t)output * inputs + column;
        if (LOADS == 16)
            raw.chunk = *reinterpret_cast<const decltype(raw.chunk) *>(from);
        else
            raw.values[0] = *from;
        float scale = to_float(scales[(size_t)output * ((inputs + BLOCK - 1) / BLOCK) + column / BLOCK]);
#pragma unroll
        for (int i = 0; i < LOADS; i++) to[i] = raw.values[i] * scale;
    }

    // Prefetches a row into the L2 cache.
    DEVICE void bring(int output, int inputs) const {
        const char *row = reinterpret_cast<const char *>(values + (size_t)output * inputs);
        int bytes = inputs * sizeof(*values);
        for (int at = threadIdx.x % WARP * 128; at < bytes; at += WARP * 128) prefetch(row + at);
    }
};
#else
#if WEIGHTS == WEIGHTS_F32
typedef float Value;
#elif WEIGHTS == WEIGHTS_F16
typedef f16 Value;
#else
typedef bf16 Value;
#endif
struct Weights {
    const Value *values;
    const f16 *unused;

    DEVICE void get(float (&to)[LOADS], int output, int inputs, int column) const {
        load(to, values + (size_t)output * inputs + column);
    }

    // Prefetches a row into the L2 cache.
    DEVICE void bring(int output, int inputs) const {
        const char *row = reinterpret_cast<const char *>(values + (size_t)output * inputs);
        int bytes = inputs * sizeof(*values);
        for (int at = threadIdx.x % WARP * 128; at < bytes; at += WARP * 128) prefetch(row + at);
    }
};
#endif

// out = x . weights^T
extern "C" __global__ void __launch_bounds__(WARPS *WARP)
    matvec(RESULT *out, const act *x, Weights weights, int inputs, int outputs) {
    int first = (blockIdx.x * WARPS + threadIdx.x / WARP) * OUTPUTS, lane = threadIdx.x % WARP;
    // Weights never change, so prefetching them need not wait for earlier kernels.
    for (int o = first; o < min(first + OUTPUTS, outputs); o++) weights.bring(o, inputs);
    begin_kernel();
    if (first >= outputs) return;
    float sums[OUTPUTS][ROWS];
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) sums[o][r] = 0;
#pragma unroll 4
    for (int column = lane * LOADS; column < inputs; column += WARP * LOADS) {
        float weight[OUTPUTS][LOADS];
#pragma unroll
        for (int o = 0; o < OUTPUTS; o++) weights.get(weight[o], min(first + o, outputs - 1), inputs, column);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float input[LOADS];
            load(input, x + (size_t)r * inputs + column);
#pragma unroll
            for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
                for (int i = 0; i < LOADS; i++) sums[o][r] = fmaf(weight[o][i], input[i], sums[o][r]);
        }
    }
#pragma unroll
    for (int o = 0; o < OUTPUTS; o++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float sum = lanes_sum<WARP>(sums[o][r]);
            if (lane == 0 && first + o < outputs) put(out[(size_t)r * outputs + first + o], sum);
        }
}

// out[r] = weights[ids[r]], with a block per row.
extern "C" __global__ void __launch_bounds__(WARPS *WARP)
    embed(act *out, Weights table, const unsigned *ids, int width) {
    begin_kernel();
    for (int column = threadIdx.x * LOADS; column < width; column += WARPS * WARP * LOADS) {
        float x[LOADS];
        table.get(x, ids[blockIdx.x], width, column);
        store(out + (size_t)blockIdx.x * width + column, x);
    }
}

// Converts weights to numbers, for products with many rows. The grid is (outputs, vectors).
extern "C" __global__ void __launch_bounds__(WARPS *WARP) expand(act *out, Weights weights, int inputs) {
    begin_kernel();
    int column = (blockIdx.y * WARPS * WARP + threadIdx.x) * LOADS;
    if (column >= inputs) return;
    float x[LOADS];
    weights.get(x, blockIdx.x, inputs, column);
    store(out + (size_t)blockIdx.x * inputs + column, x);
}
