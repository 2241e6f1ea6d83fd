// Cross-entropy of rows of logits in f32, and its gradient, which replaces them.
#include "common.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / WARP;

// The largest of some numbers, and the sum of exp(number - largest).
struct LogSum {
    float most, sum;

    DEVICE void add(LogSum other) {
        float most_of_both = fmaxf(most, other.most);
        // An empty sum is 0 at any scale.
        float own = most == most_of_both ? sum : sum * expf(most - most_of_both);
        float its = other.most == most_of_both ? other.sum : other.sum * expf(other.most - most_of_both);
        most = most_of_both;
        sum = own + its;
    }
};

DEVICE LogSum block_log_sum(LogSum own) {
    __shared__ float most[WARPS], sums[WARPS];
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        // Both lanes put the lower lane's sum first, so that both get the same bits.
        float other_most = __shfl_xor_sync(ALL_LANES, own.most, step);
        float other_sum = __shfl_xor_sync(ALL_LANES, own.sum, step);
        LogSum other = {other_most, other_sum};
        if (threadIdx.x & step) {
            other.add(own);
            own = other;
        } else {
            own.add(other);
        }
    }
    if (threadIdx.x % WARP == 0) {
        most[threadIdx.x / WARP] = own.most;
        sums[threadIdx.x / WARP] = own.sum;
    }
    __syncthreads();
    LogSum total = {most[0], sums[0]};
    for (int warp = 1; warp < WARPS; warp++) total.add({most[warp], sums[warp]});
    return total;
}

DEVICE LogSum row_log_sum(const float *row, int vocabulary) {
    LogSum own = {negative_infinity(), 0};
    for (int column = threadIdx.x * VEC; column < vocabulary; column += THREADS * VEC) {
        float x[VEC];
        load(x, row + column);
        float most = x[0];
#pragma unroll
        for (int i = 1; i < VEC; i++) most = fmaxf(most, x[i]);
        float sum = 0;
#pragma unroll
        for (int i = 0; i < VEC; i++) sum += expf(x[i] - most);
        own.add({most, sum});
    }
    return block_log_sum(own);
}

// The largest of some numbers and its index: the first of equal ones, and never NaN.
struct Greatest {
    float value;
    unsigned index;

    DEVICE void add(float other, unsigned its) {
        if (other > value || (other == value && its < index)) {
            value = other;
            index = its;
        }
    }
};

// The most likely token of each row, with a block per row.
extern "C" __global__ void __launch_bounds__(THREADS) greedy(unsigned *out, const float *logits, int vocabulary) {
    begin_kernel();
    __shared__ Greatest shared[WARPS];
    const float *row = logits + (size_t)blockIdx.x * vocabulary;
    Greatest own = {negative_infinity(), 0};
    for (int column = threadIdx.x; column < vocabulary; column += THREADS) own.add(row[column], column);
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        float value = __shfl_xor_sync(ALL_LANES, own.value, step);
        own.add(value, __shfl_xor_sync(ALL_LANES, own.index, step));
    }
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = own;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int warp = 1; warp < WARPS; warp++) own.add(shared[warp].value, shared[warp].index);
        out[blockIdx.x] = own.index;
    }
}

// Cross-entropy of each row, or 0 if the target is IGNORE, with a block per row. `lse` may be null.
extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy(float *out, float *lse, const float *logits, const unsigned *targets, int vocabulary) {
    begin_kernel();
    unsigned target = targets[blockIdx.x];
    const float *row = logits + (size_t)blockIdx.x * vocabulary;
    float loss = 0, log_sum = 0;
    if (target != IGNORE) {
        LogSum total = row_log_sum(row, vocabulary);
        log_sum = total.most + logf(total.sum);
        loss = log_sum - row[target];
    }
    if (threadIdx.x == 0) {
        out[blockIdx.x] = loss;
        if (lse) lse[blockIdx.x] = log_sum;
    }
}

// Cross-entropy and logsumexp of each row, and the gradient of weight (cross_entropy + z_loss lse^2) for each logit:
// weight (softmax (1 + 2 z_loss lse) - onehot). `weights` may be null, and all are 1 then. Each row of gradients replaces its logits; if activations are narrower than logits, it
// takes the first part of their memory.
extern "C" __global__ void __launch_bounds__(THREADS)
    loss_backward(float *out, float *lse, float *logits, const unsigned *targets, const float *weights, int vocabulary,
                  float z_loss) {
    begin_kernel();
    unsigned target = targets[blockIdx.x];
    float weight = weights ? weights[blockIdx.x] : 1;
    float *row = logits + (size_t)blockIdx.x * vocabulary;
    act *gradient = reinterpret_cast<act *>(row);
    float at_target = 0, log_sum = 0, most = 0, scale = 0;
    if (target != IGNORE) {
        LogSum total = row_log_sum(row, vocabulary);
        most = total.most;
        log_sum = most + logf(total.sum);
        at_target = row[target];
        scale = weight * (1.0f + 2.0f * z_loss * log_sum) / total.sum;
    }
    if (threadIdx.x == 0) {
        out[blockIdx.x] = log_sum - at_target;
        lse[blockIdx.x] = log_sum;
    }
    for (int start = 0; start < vocabulary; start += THREADS * VEC) {
        int column = start + threadIdx.x * VEC;
        bool live = column < vocabulary;
        float x[VEC];
        if (live) {
            load(x, row + column);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                x[i] = target == IGNORE ? 0 : scale * expf(x[i] - most);
                if (column + i == target) x[i] -= weight;
            }
        }
        // The next writes may go to memory that other threads have yet to read in this round.
        __syncthreads();
        if (live) store(gradient + column, x);
    }
}
