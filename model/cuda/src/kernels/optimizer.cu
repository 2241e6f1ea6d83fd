// Operations on a finished gradient: exact sums, squared norms, and AdamW.
#include "common.cuh"

constexpr int THREADS = 256;

// Copies parameters to the format of activations, which matrix products read.
extern "C" __global__ void __launch_bounds__(THREADS) round_values(act *out, const float *values, long long len) {
    begin_kernel();
    long long at = ((long long)blockIdx.x * THREADS + threadIdx.x) * VEC;
    if (at >= len) return;
    float x[VEC];
    load(x, values + at);
    store(out + at, x);
}

struct AdamW {
    float gradient_scale, decay, first_share, beta2, second_share, step_size, second_correction, epsilon;
};

// An AdamW step. `rounded` is the copy of the weights that matrix products read, or null.
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
        m[i] += step.first_share * (slope - m[i]);
        v[i] = step.beta2 * v[i] + step.second_share * (slope * slope);
        float root = sqrtf(v[i]) / step.second_correction + step.epsilon;
        w[i] = w[i] * step.decay - step.step_size * (m[i] / root);
    }
    store(weights + at, w);
    store(first + at, m);
    store(second + at, v);
    if (rounded) store(rounded + at, w);
}

// The sum of squares of each `block` elements in f64, with a thread block for each.
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

// Number of elements per thread, at a distance of THREADS. A thread loads all of them before it waits.
constexpr int OWN = 4;

DEVICE long long own(int i) { return ((long long)blockIdx.x * OWN + i) * THREADS + threadIdx.x; }

// Loads a thread's elements. Those beyond `len` become 0.
template <class T>
DEVICE void load_own(T (&to)[OWN], const T *from, long long len) {
#pragma unroll
    for (int i = 0; i < OWN; i++) to[i] = own(i) < len ? from[own(i)] : 0;
}

template <class T>
DEVICE void store_own(T *to, const T (&from)[OWN], long long len) {
#pragma unroll
    for (int i = 0; i < OWN; i++)
        if (own(i) < len) to[own(i)] = from[i];
}

// A gradient in quanta, rounded half to even. `outside` becomes 1 if it is beyond the limit.
DEVICE long long quanta(float gradient, unsigned *outside, double inverse, double limit) {
    double x = gradient;
    if (!(fabs(x) <= limit)) atomicOr(outside, 1u);
    return __double2ll_rn(x * inverse);
}

DEVICE float mean_of(long long sum, double scale) { return __double2float_rn(__ll2double_rn(sum) * scale); }

// Adds the gradient, in quanta, to the sums, or overwrites them.
extern "C" __global__ void __launch_bounds__(THREADS)
    quantise(long long *sums, unsigned *outside, const float *gradient, long long len, double inverse, double limit,
             int accumulate) {
    begin_kernel();
    float x[OWN];
    long long sum[OWN] = {};
    load_own(x, gradient, len);
    if (accumulate) load_own(sum, sums, len);
#pragma unroll
    for (int i = 0; i < OWN; i++) sum[i] += quanta(x[i], outside, inverse, limit);
    store_own(sums, sum, len);
}

// Replaces the gradient by its integer number of quanta times `scale`.
extern "C" __global__ void __launch_bounds__(THREADS)
    quantise_mean(float *gradient, unsigned *outside, long long len, double inverse, double limit, double scale) {
    begin_kernel();
    float x[OWN];
    load_own(x, gradient, len);
#pragma unroll
    for (int i = 0; i < OWN; i++) x[i] = mean_of(quanta(x[i], outside, inverse, limit), scale);
    store_own(gradient, x, len);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    dequantise(float *mean, const long long *sums, long long len, double scale) {
    begin_kernel();
    long long sum[OWN];
    float x[OWN];
    load_own(sum, sums, len);
#pragma unroll
    for (int i = 0; i < OWN; i++) x[i] = mean_of(sum[i], scale);
    store_own(mean, x, len);
}
