// Normalises and rotates query and key heads, and copies value heads. A few lanes share a head. Each has the same
// columns of both halves, so that the rotation needs no other lanes.
//
// HALF: half the width of a head. HEAD_LANES: lanes per head, a power of two. CENTRED: 0 or 1, as in norm.cu.
#include "common.cuh"

constexpr int THREADS = 256;
constexpr int WIDTH = 2 * HALF;
constexpr int VECTORS = (HALF + HEAD_LANES * VEC - 1) / (HEAD_LANES * VEC);
constexpr int GROUPS = THREADS / HEAD_LANES;
constexpr float EPSILON = CENTRED ? 1e-5f : 1e-6f;

DEVICE int column(int vector) { return (vector * HEAD_LANES + threadIdx.x % HEAD_LANES) * VEC; }

#define EACH(v, i)                                      \
    _Pragma("unroll") for (int v = 0; v < VECTORS; v++) \
        if (column(v) < HALF)                           \
            _Pragma("unroll") for (int i = 0; i < VEC; i++)

// A lane's part of a head: columns of the first half, and the same columns of the second half.
struct Head {
    float low[VECTORS][VEC], high[VECTORS][VEC];

    template <class T>
    DEVICE void load(const T *head) {
#pragma unroll
        for (int v = 0; v < VECTORS; v++)
            if (column(v) < HALF) {
                ::load(low[v], head + column(v));
                ::load(high[v], head + HALF + column(v));
            }
    }

    template <class T>
    DEVICE void store(T *head) const {
#pragma unroll
        for (int v = 0; v < VECTORS; v++)
            if (column(v) < HALF) {
                ::store(head + column(v), low[v]);
                ::store(head + HALF + column(v), high[v]);
            }
    }
};

struct Moments {
    float mean, scale;
};

DEVICE Moments moments(const Head &head) {
    float mean = 0;
    if (CENTRED) {
        float sum = 0;
        EACH(v, i) sum += head.low[v][i] + head.high[v][i];
        mean = lanes_sum<HEAD_LANES>(sum) / WIDTH;
    }
    float squares = 0;
    EACH(v, i) {
        float low = head.low[v][i] - mean, high = head.high[v][i] - mean;
        squares += low * low + high * high;
    }
    squares = lanes_sum<HEAD_LANES>(squares);
    return {mean, 1.0f / sqrtf(squares / WIDTH + EPSILON)};
}

// The angles for a row, whose span begins at position first[row / length].
struct Angles {
    const float *cos, *sin;

    DEVICE Angles(const float *cos_table, const float *sin_table, const unsigned *first, int length, int row) {
        size_t at = (size_t)(first[row / length] + row % length) * HALF;
        cos = cos_table + at;
        sin = sin_table + at;
    }

    // Rotates a head, or rotates it back with `direction` -1.
    DEVICE void turn(Head &head, float direction) const {
#pragma unroll
        for (int v = 0; v < VECTORS; v++)
            if (column(v) < HALF) {
                float c[VEC], s[VEC];
                load(c, cos + column(v));
                load(s, sin + column(v));
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    float low = head.low[v][i], high = head.high[v][i], turned = direction * s[i];
                    head.low[v][i] = low * c[i] - high * turned;
                    head.high[v][i] = high * c[i] + low * turned;
                }
            }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    qk_norm_rope(act *out, const act *packed, const float *weights, const float *cos, const float *sin,
                 const unsigned *first, int length, int rows, int query, int key_value) {
    begin_kernel();
    int heads = query + 2 * key_value;
    unsigned index = blockIdx.x * GROUPS + threadIdx.x / HEAD_LANES;
    // Lanes beyond the last head continue, because the sums over lanes need them.
    bool live = index < (unsigned)(rows * heads);
    if (!live) index = 0;
    int row = index / heads, head = index % heads;
    size_t at = (size_t)index * WIDTH;
    Head x;
    x.load(packed + at);
    Moments of = moments(x);
    if (head < query + key_value) {
        Head weight;
        weight.load(weights + (head < query ? 0 : WIDTH));
        EACH(v, i) {
            x.low[v][i] = (x.low[v][i] - of.mean) * of.scale * weight.low[v][i];
            x.high[v][i] = (x.high[v][i] - of.mean) * of.scale * weight.high[v][i];
        }
        Angles(cos, sin, first, length, row).turn(x, 1);
    }
    if (live) x.store(out + at);
}

// The gradients of the queries or keys in the rows begin..end, and the sum of the gradients of their norm's weights.
DEVICE void side_backward(act *packed, float *weight_gradient, const act *gradient, const float *weights,
                          const float *cos, const float *sin, const unsigned *first, int length, int begin, int end,
                          int heads, int first_head, int count, float *shared) {
    int group = threadIdx.x / HEAD_LANES;
    Head weight, sums;
    weight.load(weights);
    EACH(v, i) sums.low[v][i] = sums.high[v][i] = 0;
    int total = (end - begin) * count;
    for (int before = 0; before < total; before += GROUPS) {
        int index = before + group;
        bool live = index < total;
        if (!live) index = 0;
        int row = begin + index / count;
        size_t at = ((size_t)row * heads + first_head + index % count) * WIDTH;
        Head x, upstream;
        x.load(packed + at);
        upstream.load(gradient + at);
        Angles(cos, sin, first, length, row).turn(upstream, -1);
        Moments of = moments(x);
        float pull = 0, of_mean = 0;
        EACH(v, i) {
            x.low[v][i] -= of.mean;
            x.high[v][i] -= of.mean;
            float low = upstream.low[v][i] * weight.low[v][i], high = upstream.high[v][i] * weight.high[v][i];
            pull += low * x.low[v][i] + high * x.high[v][i];
            of_mean += low + high;
        }
        pull = lanes_sum<HEAD_LANES>(pull) * of.scale * of.scale / WIDTH;
        of_mean = CENTRED ? lanes_sum<HEAD_LANES>(of_mean) / WIDTH : 0;
        if (live) {
            EACH(v, i) {
                float low = x.low[v][i], high = x.high[v][i];
                sums.low[v][i] += upstream.low[v][i] * low * of.scale;
                sums.high[v][i] += upstream.high[v][i] * high * of.scale;
                x.low[v][i] = of.scale * (upstream.low[v][i] * weight.low[v][i] - of_mean - low * pull);
                x.high[v][i] = of.scale * (upstream.high[v][i] * weight.high[v][i] - of_mean - high * pull);
            }
            x.store(packed + at);
        }
    }
    __syncthreads();
    sums.store(shared + group * WIDTH);
    __syncthreads();
    for (int i = threadIdx.x; i < WIDTH; i += THREADS) {
        float sum = 0;
        for (int g = 0; g < GROUPS; g++) sum += shared[g * WIDTH + i];
        weight_gradient[i] = sum;
    }
}

// Replaces packed rows by their gradients, with a block per `block_rows` rows. The block's sum of the weights'
// gradients, [2, H], becomes a row of `partial`.
extern "C" __global__ void __launch_bounds__(THREADS)
    qk_norm_rope_backward(act *packed, float *partial, const act *gradient, const float *weights, const float *cos,
                          const float *sin, const unsigned *first, int length, int rows, int block_rows, int query,
                          int key_value) {
    begin_kernel();
    __shared__ __align__(16) float shared[GROUPS * WIDTH];
    int heads = query + 2 * key_value;
    int begin = blockIdx.x * block_rows, end = min(rows, begin + block_rows);
    float *into = partial + (size_t)blockIdx.x * 2 * WIDTH;
    side_backward(packed, into, gradient, weights, cos, sin, first, length, begin, end, heads, 0, query, shared);
    side_backward(packed, into + WIDTH, gradient, weights + WIDTH, cos, sin, first, length, begin, end, heads, query,
                  key_value, shared);
    int total = (end - begin) * key_value;
    for (int index = threadIdx.x / HEAD_LANES; index < total; index += GROUPS) {
        size_t at = ((size_t)(begin + index / key_value) * heads + query + key_value + index % key_value) * WIDTH;
        Head values;
        values.load(gradient + at);
        values.store(packed + at);
    }
}
