// Norms of rows, each of which is read once: layer norm if CENTRED, or else RMS norm. A group of threads shares a row.
//
// WIDTH: number of elements in a row, D. CENTRED: 0 or 1.
#include "common.cuh"

constexpr int THREADS = 128;
// Number of rows that a block processes at a time in the backward pass.
constexpr int GROUPS = 4;
constexpr int VECTORS = (WIDTH + THREADS * VEC - 1) / (THREADS * VEC);
constexpr float EPSILON = CENTRED ? 1e-5f : 1e-6f;

// A thread's part of a row: the vectors `lane`, `lane + THREADS`, …
struct Row {
    float x[VECTORS][VEC];

    static DEVICE int column(int vector) { return (vector * THREADS + threadIdx.x % THREADS) * VEC; }

    template <class T>
    DEVICE void load(const T *row) {
#pragma unroll
        for (int v = 0; v < VECTORS; v++) {
#pragma unroll
            for (int i = 0; i < VEC; i++) x[v][i] = 0;
            if (column(v) < WIDTH) ::load(x[v], row + column(v));
        }
    }

    // Prefetches a row into the L2 cache with wide loads.
    template <class T>
    static DEVICE void bring(const T *row) {
        if (VEC == 1) return;
#pragma unroll
        for (int v = 0; v < VECTORS; v++)
            if (column(v) < WIDTH && column(v) * sizeof(T) % 128 == 0) prefetch(row + column(v));
    }

    template <class T>
    DEVICE void store(T *row) const {
#pragma unroll
        for (int v = 0; v < VECTORS; v++)
            if (column(v) < WIDTH) ::store(row + column(v), x[v]);
    }
};

// Loops over the elements of a thread's part, except those beyond the row.
#define EACH(v, i)                                                 \
    _Pragma("unroll") for (int v = 0; v < VECTORS; v++)            \
        if (Row::column(v) < WIDTH)                                \
            _Pragma("unroll") for (int i = 0; i < VEC; i++)

// The value that is subtracted from a row, and the factor that the difference is multiplied by.
struct Moments {
    float mean, scale;
};

template <int GROUPS>
DEVICE Moments moments(const Row &row, float *shared) {
    float mean = 0;
    if (CENTRED) {
        float sum = 0;
        EACH(v, i) sum += row.x[v][i];
        mean = group_sum<THREADS, GROUPS>(sum, shared) / WIDTH;
    }
    float squares = 0;
    EACH(v, i) squares += (row.x[v][i] - mean) * (row.x[v][i] - mean);
    squares = group_sum<THREADS, GROUPS>(squares, shared);
    return {mean, 1.0f / sqrtf(squares / WIDTH + EPSILON)};
}

DEVICE void normalise(act *out, Row &row, const float *weight) {
    __shared__ float shared[THREADS / WARP];
    Moments of = moments<1>(row, shared);
    Row weights;
    weights.load(weight);
    EACH(v, i) row.x[v][i] = (row.x[v][i] - of.mean) * of.scale * weights.x[v][i];
    row.store(out);
}

// out = norm(x), with a block per row.
extern "C" __global__ void __launch_bounds__(THREADS) norm_rows(act *out, const act *x, const float *weight) {
    begin_kernel();
    size_t at = (size_t)blockIdx.x * WIDTH;
    Row row;
    row.load(x + at);
    normalise(out + at, row, weight);
}

// sum = x + delta, out = norm(sum), with a block per row.
extern "C" __global__ void __launch_bounds__(THREADS)
    add_norm(act *sum, act *out, const act *x, const act *delta, const float *weight) {
    begin_kernel();
    size_t at = (size_t)blockIdx.x * WIDTH;
    Row row, other;
    row.load(x + at);
    other.load(delta + at);
    EACH(v, i) {
        row.x[v][i] += other.x[v][i];
        // The norm is computed from the sum as it is stored.
        act kept;
        put(kept, row.x[v][i]);
        row.x[v][i] = to_float(kept);
    }
    row.store(sum + at);
    normalise(out + at, row, weight);
}

// With c = x - mean and the scale s: dx = s (g w - mean(g w) - c s^2 mean(g w c)), dw += g c s. There is a block per
// `block_rows` rows, whose sum of dw becomes a row of `partial`.
extern "C" __global__ void __launch_bounds__(THREADS *GROUPS)
    norm_backward(act *x_gradient, float *partial, const act *gradient, const act *x, const float *weight, int rows,
                  int block_rows, int accumulate) {
    begin_kernel();
    __shared__ float shared[GROUPS * THREADS / WARP];
    int group = threadIdx.x / THREADS;
    int begin = blockIdx.x * block_rows;
    int end = min(rows, begin + block_rows);
    Row weights, sums;
    weights.load(weight);
    EACH(v, i) sums.x[v][i] = 0;
    for (int first = begin; first < end; first += GROUPS) {
        // Groups beyond the last row continue, because the barriers need them.
        int row_index = first + group;
        bool live = row_index < end;
        size_t at = (size_t)(live ? row_index : begin) * WIDTH;
        Row row, upstream;
        row.load(x + at);
        upstream.load(gradient + at);
        // Prefetch what is needed next, so that memory is not idle during the sums.
        if (accumulate) Row::bring(x_gradient + at);
        if (row_index + GROUPS < end) {
            Row::bring(x + at + GROUPS * WIDTH);
            Row::bring(gradient + at + GROUPS * WIDTH);
        }
        Moments of = moments<GROUPS>(row, shared);
        float pull = 0, of_mean = 0;
        EACH(v, i) {
            row.x[v][i] -= of.mean;
            float weighted = upstream.x[v][i] * weights.x[v][i];
            pull += weighted * row.x[v][i];
            of_mean += weighted;
        }
        pull = group_sum<THREADS, GROUPS>(pull, shared) * of.scale * of.scale / WIDTH;
        of_mean = CENTRED ? group_sum<THREADS, GROUPS>(of_mean, shared) / WIDTH : 0;
        if (live) {
            Row own;
            if (accumulate) own.load(x_gradient + at);
            EACH(v, i) {
                float c = row.x[v][i], g = upstream.x[v][i];
                sums.x[v][i] += g * c * of.scale;
                float dx = of.scale * (g * weights.x[v][i] - of_mean - c * pull);
                own.x[v][i] = accumulate ? own.x[v][i] + dx : dx;
            }
            own.store(x_gradient + at);
        }
    }
    // Groups add their sums in turn.
    float *into = partial + (size_t)blockIdx.x * WIDTH;
    for (int turn = 0; turn < GROUPS; turn++) {
        if (group == turn) {
            Row before;
            if (turn > 0) {
                before.load(into);
                EACH(v, i) sums.x[v][i] += before.x[v][i];
            }
            sums.store(into);
        }
        __syncthreads();
    }
}
