// The operations that an eager framework composes an RMS norm of: each goes over a whole tensor and leaves its result
// in memory. They exist to measure what OpenELM's authors trained with, so nothing takes fewer passes than in an eager
// framework.
#include "common.cuh"

constexpr int THREADS = 256;

DEVICE long long own() { return (long long)blockIdx.x * THREADS + threadIdx.x; }

// A range of columns: column c of row r is base[r * stride + c].
template <class T>
struct Columns {
    T *base;
    int stride;

    DEVICE T &at(long long index, int width) const { return base[index / width * stride + index % width]; }
};

// to = from, converted to f32.
extern "C" __global__ void __launch_bounds__(THREADS)
    widen(float *to, Columns<const act> from, int width, long long len) {
    begin_kernel();
    if (own() < len) to[own()] = to_float(from.at(own(), width));
}

// to = from, rounded, or to += from with `accumulate`.
extern "C" __global__ void __launch_bounds__(THREADS)
    narrow(Columns<act> to, const float *from, int width, long long len, int accumulate) {
    begin_kernel();
    if (own() >= len) return;
    act &into = to.at(own(), width);
    put(into, accumulate ? to_float(into) + from[own()] : from[own()]);
}

extern "C" __global__ void __launch_bounds__(THREADS) copy_wide(float *to, const float *from, long long len) {
    begin_kernel();
    if (own() < len) to[own()] = from[own()];
}

// to = from, in the same format.
extern "C" __global__ void __launch_bounds__(THREADS)
    copy(Columns<act> to, Columns<const act> from, int width, long long len) {
    begin_kernel();
    if (own() < len) to.at(own(), width) = from.at(own(), width);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add(act *sum, const act *a, const act *b, long long len) {
    begin_kernel();
    if (own() < len) put(sum[own()], to_float(a[own()]) + to_float(b[own()]));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    multiply(float *out, const float *a, const float *b, long long len) {
    begin_kernel();
    if (own() < len) out[own()] = a[own()] * b[own()];
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sum(float *out, const float *a, const float *b, long long len) {
    begin_kernel();
    if (own() < len) out[own()] = a[own()] + b[own()];
}

// Multiplies each row by its factor.
extern "C" __global__ void __launch_bounds__(THREADS)
    multiply_rows(float *out, const float *x, const float *factors, int width, long long len) {
    begin_kernel();
    if (own() < len) out[own()] = x[own()] * factors[own() / width];
}

// Multiplies each column by its factor.
extern "C" __global__ void __launch_bounds__(THREADS)
    multiply_columns(float *out, const float *x, const float *factors, int width, long long len) {
    begin_kernel();
    if (own() < len) out[own()] = x[own()] * factors[own() % width];
}

// The mean of each row, with a warp per row.
extern "C" __global__ void __launch_bounds__(THREADS)
    mean_of_rows(float *means, const float *x, int width, int rows) {
    begin_kernel();
    int row = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
    if (row >= rows) return;
    float total = 0;
    for (int column = threadIdx.x % WARP; column < width; column += WARP) total += x[(size_t)row * width + column];
    total = lanes_sum<WARP>(total);
    if (threadIdx.x % WARP == 0) means[row] = total / width;
}

extern "C" __global__ void __launch_bounds__(THREADS) inverse_root(float *scale, const float *mean, long long len) {
    begin_kernel();
    if (own() < len) scale[own()] = 1.0f / sqrtf(mean[own()] + 1e-6f);
}

// The gradient of the mean squares, from the gradient of their inverse roots. Both are divided by the row's length.
extern "C" __global__ void __launch_bounds__(THREADS)
    inverse_root_backward(float *mean, const float *scale, long long len) {
    begin_kernel();
    if (own() < len) mean[own()] = -0.5f * mean[own()] * scale[own()] * scale[own()] * scale[own()];
}

// The gradient through the squares: 2 x times the gradient of the row's mean.
extern "C" __global__ void __launch_bounds__(THREADS)
    square_backward(float *out, const float *x, const float *mean, int width, long long len) {
    begin_kernel();
    if (own() < len) out[own()] = 2.0f * x[own()] * mean[own() / width];
}

// Sums over blocks of rows, with the grid (blocks of rows, columns).
extern "C" __global__ void __launch_bounds__(THREADS)
    sum_blocks(float *partial, const float *x, int width, int rows, int block_rows) {
    begin_kernel();
    int column = blockIdx.y * THREADS + threadIdx.x;
    if (column >= width) return;
    float total = 0;
    int begin = blockIdx.x * block_rows, end = min(rows, begin + block_rows);
    for (int row = begin; row < end; row++) total += x[(size_t)row * width + column];
    partial[(size_t)blockIdx.x * width + column] = total;
}

// Rotates heads, or rotates them back, as in heads.cu. Rows have `count` heads of width 2 half.
extern "C" __global__ void __launch_bounds__(THREADS)
    rotate(Columns<act> to, const float *from, const float *cos, const float *sin, const unsigned *first, int length,
           int count, int half, long long pairs) {
    begin_kernel();
    if (own() >= pairs) return;
    long long head = own() / half;
    int row = head / count, column = own() % half;
    size_t angle = (size_t)(first[row / length] + row % length) * half + column;
    const float *x = from + head * 2 * half + column;
    act *out = to.base + (size_t)row * to.stride + head % count * 2 * half + column;
    put(out[0], x[0] * cos[angle] - x[half] * sin[angle]);
    put(out[half], x[half] * cos[angle] + x[0] * sin[angle]);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rotate_back(float *to, Columns<const act> from, const float *cos, const float *sin, const unsigned *first,
                int length, int count, int half, long long pairs) {
    begin_kernel();
    if (own() >= pairs) return;
    long long head = own() / half;
    int row = head / count, column = own() % half;
    size_t angle = (size_t)(first[row / length] + row % length) * half + column;
    const act *x = from.base + (size_t)row * from.stride + head % count * 2 * half + column;
    float *out = to + head * 2 * half + column;
    float low = to_float(x[0]), high = to_float(x[half]);
    out[0] = low * cos[angle] + high * sin[angle];
    out[half] = high * cos[angle] - low * sin[angle];
}
