// What adapters need beyond matrix products: dropout, rows that are put elsewhere, and the magnitudes of DoRA.
#include "common.cuh"

constexpr int THREADS = 256;

// The column of a thread's vector, in a grid of (rows, vectors).
DEVICE int own_column() { return (blockIdx.y * THREADS + threadIdx.x) * VEC; }

extern "C" __global__ void __launch_bounds__(THREADS) scale(act *x, float factor, long long len) {
    begin_kernel();
    long long at = ((long long)blockIdx.x * THREADS + threadIdx.x) * VEC;
    if (at >= len) return;
    float own[VEC];
    load(own, x + at);
#pragma unroll
    for (int i = 0; i < VEC; i++) own[i] *= factor;
    store(x + at, own);
}

// out[rows[r]] = x[r].
extern "C" __global__ void __launch_bounds__(THREADS)
    scatter(act *out, const act *x, const unsigned *rows, int width) {
    begin_kernel();
    int column = own_column();
    if (column >= width) return;
    float own[VEC];
    load(own, x + (size_t)blockIdx.x * width + column);
    store(out + (size_t)rows[blockIdx.x] * width + column, own);
}

// out[r] += x[rows[r]].
extern "C" __global__ void __launch_bounds__(THREADS)
    gather_add(act *out, const act *x, const unsigned *rows, int width) {
    begin_kernel();
    int column = own_column();
    if (column >= width) return;
    float own[VEC], sum[VEC];
    load(own, x + (size_t)rows[blockIdx.x] * width + column);
    act *to = out + (size_t)blockIdx.x * width + column;
    load(sum, to);
#pragma unroll
    for (int i = 0; i < VEC; i++) sum[i] += own[i];
    store(to, sum);
}

// The hash that spreads every bit, as in dropout.rs of the backend crate, which says what is left out.
DEVICE unsigned long long mix(unsigned long long x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

DEVICE bool keeps(unsigned long long row, unsigned column, unsigned threshold) {
    unsigned x = column * 0x9e3779b1u + (unsigned)row;
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x ^= (unsigned)(row >> 32);
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x >= threshold;
}

// out = x times the factor of each element, or out += that.
extern "C" __global__ void __launch_bounds__(THREADS)
    dropout(act *out, const act *x, const unsigned *sequences, int length, const unsigned *positions,
            long long key, int threshold, float kept, float left_out, int width, int accumulate) {
    begin_kernel();
    int column = own_column();
    if (column >= width) return;
    unsigned at_all = positions[blockIdx.x];
    int sequence = at_all / length, position = at_all % length;
    unsigned long long number = sequences[2 * sequence] | (unsigned long long)sequences[2 * sequence + 1] << 32;
    unsigned long long row = mix(mix((unsigned long long)key + number) + (unsigned long long)position);
    size_t at = (size_t)blockIdx.x * width + column;
    float own[VEC], sum[VEC];
    load(own, x + at);
    if (accumulate) load(sum, out + at);
#pragma unroll
    for (int i = 0; i < VEC; i++) {
        float factor = keeps(row, column + i, (unsigned)threshold) ? kept : left_out;
        own[i] = (accumulate ? sum[i] : 0) + own[i] * factor;
    }
    store(out + at, own);
}

// The gains and inverse norms of the rows of W + scale B A, with a thread per row. `across` is W A^T, and `among` is
// B A A^T.
extern "C" __global__ void __launch_bounds__(THREADS)
    gains(float *gains, const float *magnitude, const float *squares, const float *b, const float *across,
          const float *among, float scale, int outputs, int rank) {
    begin_kernel();
    int row = blockIdx.x * THREADS + threadIdx.x;
    if (row >= outputs) return;
    size_t at = (size_t)row * rank;
    double with_weights = 0, own = 0;
    for (int k = 0; k < rank; k++) {
        with_weights += (double)b[at + k] * across[at + k];
        own += (double)b[at + k] * among[at + k];
    }
    double square = squares[row] + 2.0 * scale * with_weights + (double)scale * scale * own;
    float norm = sqrtf(fmaxf((float)square, 0.0f));
    gains[row] = norm == 0 ? 1 : magnitude[row] / norm;
    gains[outputs + row] = norm == 0 ? 0 : 1 / norm;
}

// out = x times the gain of each column, or out += that.
extern "C" __global__ void __launch_bounds__(THREADS)
    scale_columns(act *out, const act *x, const float *gains, int width, int accumulate) {
    begin_kernel();
    int column = own_column();
    if (column >= width) return;
    size_t at = (size_t)blockIdx.x * width + column;
    float own[VEC], gain[VEC], sum[VEC];
    load(own, x + at);
    load(gain, gains + column);
    if (accumulate) load(sum, out + at);
#pragma unroll
    for (int i = 0; i < VEC; i++) own[i] = (accumulate ? sum[i] : 0) + own[i] * gain[i];
    store(out + at, own);
}

// partial[block][c] = factors[c] times the sum of a[r][c] b[r][c] over the rows of a block, with a thread per column and the
// grid (blocks, columns).
extern "C" __global__ void __launch_bounds__(THREADS)
    column_products(float *partial, const act *a, const act *b, const float *factors, int rows, int width,
                    int block_rows) {
    begin_kernel();
    int column = blockIdx.y * THREADS + threadIdx.x;
    if (column >= width) return;
    int begin = blockIdx.x * block_rows, end = min(rows, begin + block_rows);
    float sum = 0;
    for (int row = begin; row < end; row++) {
        size_t at = (size_t)row * width + column;
        sum += to_float(a[at]) * to_float(b[at]);
    }
    partial[(size_t)blockIdx.x * width + column] = factors[column] * sum;
}
