// What happens to a finished gradient: exact sums, its norm, and AdamW.
#include "common.cuh"

constexpr int THREADS = 256;

// Copies parameters in the format of the activations, which matrix products read.
extern "C" __global__ void __launch_bounds__(THREADS) round_values(act *out, const float *values, long long len) {
    begin_kernel();
    long long at = ((long long)blockIdx.x * THREADS + threadIdx.x) * VEC;
    if (at >= len) return;
    float x[VEC];
    load(x, values + at);
    store(out + at, x);
}

struct AdamW {
    float gradient_scale, decay, beta1, beta2, step_size, second_correction, epsilon;
};

// One step; `rounded` is the copy of the weights that matrix products read, or null.
extern "C" __global__ void __launch_bounds__(THREADS)
    adamw(float *weights, act *rounded, float *first, float *second, const float *gradient, long long len, AdamW step) {
    begin_kernel();
    long long at = ((long long)blockIdx.x * THREADS + threadIdx.x) * VEC;
    if (at >= len) return;
    float w[VEC], m[VEC], v[VEC], g[VEC];
    load(w, weights + at);
    load(m, first + at);
    load(v, second + at);
    load(g, gradient + at);
#pragma unroll
    for (int i = 0; i < VEC; i++) {
        float slope = g[i] * step.gradient_scale;
        m[i] += (1.0f - step.beta1) * (slope - m[i]);
        v[i] = step.beta2 * v[i] + (1.0f - step.beta2) * (slope * slope);
        float root = sqrtf(v[i]) / step.second_correction + step.epsilon;
        w[i] = w[i] * step.decay - step.step_size * (m[i] / root);
    }
    store(weights + at, w);
    store(first + at, m);
    store(second + at, v);
    if (rounded) store(rounded + at, w);
}

// Sum of squares of each `block` elements, in f64; a thread block per such block.
extern "C" __global__ void __launch_bounds__(THREADS)
    block_squares(double *sums, const float *x, long long len, int block) {
    begin_kernel();
    __shared__ double shared[THREADS];
    long long begin = (long long)blockIdx.x * block, end = begin + block < len ? begin + block : len;
    double sum = 0;
    for (long long i = begin + threadIdx.x; i < end; i += THREADS) sum += (double)x[i] * (double)x[i];
    shared[threadIdx.x] = sum;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] = shared[0];
}

// In quanta, rounded half to even; `outside` becomes 1 if it is beyond the limit.
__device__ __forceinline__ long long quanta(float gradient, unsigned *outside, double inverse, double limit) {
    double x = gradient;
    if (!(fabs(x) <= limit)) atomicOr(outside, 1u);
    return __double2ll_rn(x * inverse);
}

// Adds the gradient in quanta, or puts it in place of the sums.
extern "C" __global__ void __launch_bounds__(THREADS)
    quantise(long long *sums, unsigned *outside, const float *gradient, long long len, double inverse, double limit,
             int accumulate) {
    begin_kernel();
    long long at = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (at >= len) return;
    long long own = quanta(gradient[at], outside, inverse, limit);
    sums[at] = accumulate ? sums[at] + own : own;
}

// The gradient in quanta, as integers, times `scale`.
extern "C" __global__ void __launch_bounds__(THREADS)
    quantise_mean(float *gradient, unsigned *outside, long long len, double inverse, double limit, double scale) {
    begin_kernel();
    long long at = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (at >= len) return;
    long long own = quanta(gradient[at], outside, inverse, limit);
    gradient[at] = __double2float_rn(__ll2double_rn(own) * scale);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    dequantise(float *mean, const long long *sums, long long len, double scale) {
    begin_kernel();
    long long at = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (at >= len) return;
    mean[at] = __double2float_rn(__ll2double_rn(sums[at]) * scale);
}
