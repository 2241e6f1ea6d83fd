// Causal attention with grouped queries for any format of activations and any width of heads, with a warp per query and
// head or per key and head. It serves f32, and heads that attention.cu does not support.
//
// HEAD: width of a head. CACHED: format of keys and values.
#include "common.cuh"

constexpr int WARPS = 4;
constexpr int PER_LANE = (HEAD + WARP - 1) / WARP;

// Rows of heads: row r of sequence s and head h begins at base + s * sequence + h * head + r * row.
template <class T>
struct Heads {
    T *base;
    long long sequence, head, row;

    DEVICE T *at(int s, int h, long long r) const { return base + s * sequence + h * head + r * row; }
};

template <class A, class B>
DEVICE float dot(const A *a, const B *b) {
    float sum = 0;
    for (int i = 0; i < HEAD; i++) sum += to_float(a[i]) * to_float(b[i]);
    return sum;
}

// A lane's columns in a sum of rows: lane, lane + 32, ...
struct Columns {
    float x[PER_LANE];

    DEVICE Columns() {
        for (int i = 0; i < PER_LANE; i++) x[i] = 0;
    }

    // Adds row(l) times the weight of lane l, for all lanes l.
    template <class Row>
    DEVICE void add(float weight, int count, Row row) {
        int lane = threadIdx.x % WARP;
        for (int l = 0; l < count; l++) {
            float own = __shfl_sync(ALL_LANES, weight, l);
            for (int i = 0; i < PER_LANE; i++)
                if (lane + i * WARP < HEAD) x[i] += own * to_float(row(l)[lane + i * WARP]);
        }
    }

    DEVICE void scale(float factor) {
        for (int i = 0; i < PER_LANE; i++) x[i] *= factor;
    }

    template <class T>
    DEVICE void store(T *to) const {
        int lane = threadIdx.x % WARP;
        for (int i = 0; i < PER_LANE; i++)
            if (lane + i * WARP < HEAD) put(to[lane + i * WARP], x[i]);
    }
};

// The same as in attention.cu, with the grid (blocks of WARPS queries, heads, spans).
extern "C" __global__ void __launch_bounds__(WARPS *WARP)
    attention(Heads<act> out, float *lse, Heads<act> queries, Heads<CACHED> keys, Heads<CACHED> values,
              const unsigned *doc_starts, const unsigned *sequences, const unsigned *first, int length, int group,
              float scale) {
    begin_kernel();
    int row = blockIdx.x * WARPS + threadIdx.x / WARP, head = blockIdx.y, span = blockIdx.z, lane = threadIdx.x % WARP;
    if (row >= length) return;
    int sequence = sequences ? sequences[span] : span;
    int position = (first ? first[span] : 0) + row;
    int start = doc_starts ? doc_starts[(long long)span * length + row] : 0;
    const act *query = queries.at(span, head, row);
    float most = negative_infinity(), sum = 0;
    Columns acc;
    for (int begin = start; begin <= position; begin += WARP) {
        int key = begin + lane;
        float score = key <= position ? dot(query, keys.at(sequence, head / group, key)) * scale : negative_infinity();
        float greatest = fmaxf(most, lanes_max<WARP>(score));
        float factor = expf(most - greatest), weight = expf(score - greatest);
        sum = sum * factor + lanes_sum<WARP>(weight);
        most = greatest;
        acc.scale(factor);
        acc.add(weight, min(WARP, position - begin + 1),
                [&](int l) { return values.at(sequence, head / group, begin + l); });
    }
    acc.scale(1.0f / sum);
    acc.store(out.at(span, head, row));
    if (lse && lane == 0) lse[((long long)span * gridDim.y + head) * length + row] = most + logf(sum);
}

// The gradient of the queries, and `delta`, the sum of out * gradient for each row and head.
extern "C" __global__ void __launch_bounds__(WARPS *WARP)
    attention_backward_queries(Heads<act> query_gradient, float *delta, Heads<act> out, Heads<act> gradient,
                               const float *lse, Heads<act> queries, Heads<act> keys, Heads<act> values,
                               const unsigned *doc_starts, int length, int group, float scale) {
    begin_kernel();
    int row = blockIdx.x * WARPS + threadIdx.x / WARP, head = blockIdx.y, sequence = blockIdx.z;
    int lane = threadIdx.x % WARP;
    if (row >= length) return;
    long long at = ((long long)sequence * gridDim.y + head) * length + row;
    const act *query = queries.at(sequence, head, row), *upstream = gradient.at(sequence, head, row);
    float own_delta = dot(out.at(sequence, head, row), upstream);
    if (lane == 0) delta[at] = own_delta;
    Columns acc;
    for (int begin = doc_starts[(long long)sequence * length + row]; begin <= row; begin += WARP) {
        int key = begin + lane;
        float slope = 0;
        if (key <= row) {
            float p = expf(dot(query, keys.at(sequence, head / group, key)) * scale - lse[at]);
            slope = p * (dot(upstream, values.at(sequence, head / group, key)) - own_delta) * scale;
        }
        acc.add(slope, min(WARP, row - begin + 1), [&](int l) { return keys.at(sequence, head / group, begin + l); });
    }
    acc.store(query_gradient.at(sequence, head, row));
}

// The gradients of keys and values, with a warp per key and key/value head.
extern "C" __global__ void __launch_bounds__(WARPS *WARP)
    attention_backward_keys(Heads<act> key_gradient, Heads<act> value_gradient, const float *delta,
                            Heads<act> gradient, const float *lse, Heads<act> queries, Heads<act> keys,
                            Heads<act> values, const unsigned *doc_starts, int length, int group, float scale) {
    begin_kernel();
    int row = blockIdx.x * WARPS + threadIdx.x / WARP, head = blockIdx.y, sequence = blockIdx.z;
    int lane = threadIdx.x % WARP;
    if (row >= length) return;
    const act *key = keys.at(sequence, head, row), *value = values.at(sequence, head, row);
    const unsigned *starts = doc_starts + (long long)sequence * length;
    Columns key_acc, value_acc;
    for (int query_head = head * group; query_head < (head + 1) * group; query_head++) {
        long long of_head = ((long long)sequence * gridDim.y * group + query_head) * length;
        // Documents are in order, so once a query's document begins after the key, no later query sees the key either.
        for (int begin = row; begin < length && starts[begin] <= row; begin += WARP) {
            int query = begin + lane;
            float p = 0, slope = 0;
            if (query < length && starts[query] <= row) {
                const act *upstream = gradient.at(sequence, query_head, query);
                p = expf(dot(queries.at(sequence, query_head, query), key) * scale - lse[of_head + query]);
                slope = p * (dot(upstream, value) - delta[of_head + query]) * scale;
            }
            int count = min(WARP, length - begin);
            value_acc.add(p, count, [&](int l) { return gradient.at(sequence, query_head, begin + l); });
            key_acc.add(slope, count, [&](int l) { return queries.at(sequence, query_head, begin + l); });
        }
    }
    key_acc.store(key_gradient.at(sequence, head, row));
    value_acc.store(value_gradient.at(sequence, head, row));
}
