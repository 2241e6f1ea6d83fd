// The key/value cache, [sequences, key/value heads, capacity, H], and attention of one query per sequence over it: each
// block has a chunk of the keys (Flash-Decoding, Dao et al. 2023), and another kernel joins the chunks in order.
//
// HEAD: width of a head. CACHED: format of keys and values. GROUP: query heads per key/value head.
#include "common.cuh"

// Stores the keys and values of packed rows in the cache, with a block per row.
extern "C" __global__ void cache_store(CACHED *keys, CACHED *values, const act *packed, const unsigned *sequences,
                                       const unsigned *first, int length, int capacity, int query, int key_value) {
    begin_kernel();
    int span = blockIdx.x / length;
    size_t position = first[span] + blockIdx.x % length;
    const act *row = packed + ((size_t)blockIdx.x * (query + 2 * key_value) + query) * HEAD;
    for (int at = threadIdx.x * VEC; at < key_value * HEAD; at += blockDim.x * VEC) {
        size_t head = (size_t)sequences[span] * key_value + at / HEAD;
        size_t to = (head * capacity + position) * HEAD + at % HEAD;
        float x[VEC];
        load(x, row + at);
        store(keys + to, x);
        load(x, row + key_value * HEAD + at);
        store(values + to, x);
    }
}

// Copies the first positions of sequences to other sequences. The grid is (blocks of positions, heads, forks).
extern "C" __global__ void cache_fork(CACHED *keys, CACHED *values, const unsigned *from, const unsigned *to,
                                      const unsigned *positions, int capacity, int key_value) {
    begin_kernel();
    size_t width = (size_t)capacity * HEAD, length = (size_t)positions[blockIdx.z] * HEAD;
    size_t source = ((size_t)from[blockIdx.z] * key_value + blockIdx.y) * width;
    size_t target = ((size_t)to[blockIdx.z] * key_value + blockIdx.y) * width;
    size_t stride = (size_t)gridDim.x * blockDim.x;
    for (size_t at = (size_t)blockIdx.x * blockDim.x + threadIdx.x; at < length; at += stride) {
        keys[target + at] = keys[source + at];
        values[target + at] = values[source + at];
    }
}

#ifdef GROUP
constexpr int WARPS = 4;
// Number of keys per block.
constexpr int CHUNK = 64;
// Number of elements of a head per lane, and of lanes per key.
constexpr int OWN = 8;
constexpr int LANES = HEAD / OWN;
constexpr int KEYS_PER_WARP = WARP / LANES;
constexpr int ROUNDS = CHUNK / (WARPS * KEYS_PER_WARP);

// A sum of values with the weights exp(score - most), and the sum of these weights.
struct Weighted {
    float most, sum, x[OWN];
};

// Adds `other` to `own`. One of them may be empty, with `most` at -infinity.
DEVICE void join(Weighted &own, const Weighted &other) {
    float most = fmaxf(own.most, other.most);
    float a = own.most == most ? 1 : expf(own.most - most), b = other.most == most ? 1 : expf(other.most - most);
    if (most == negative_infinity()) return;
    own.most = most;
    own.sum = own.sum * a + other.sum * b;
#pragma unroll
    for (int i = 0; i < OWN; i++) own.x[i] = own.x[i] * a + other.x[i] * b;
}

// The largest score, the sum of weights and the weighted sum of values of each chunk and query head, [spans, query
// heads, chunks, 2 + H]. The grid is (chunks, key/value heads, spans).
extern "C" __global__ void __launch_bounds__(WARPS *WARP)
    attend_chunk(float *parts, const act *packed, const CACHED *keys, const CACHED *values, const unsigned *sequences,
                 const unsigned *first, int capacity, int query, int key_value, float scale) {
    begin_kernel();
    __shared__ Weighted shared[WARPS][GROUP][LANES];
    int span = blockIdx.z, head = blockIdx.y, begin = blockIdx.x * CHUNK, end = first[span] + 1;
    if (begin >= end) return;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % LANES, own = threadIdx.x % WARP / LANES;
    const act *row = packed + (size_t)span * (query + 2 * key_value) * HEAD + head * GROUP * HEAD;
    size_t cached = ((size_t)sequences[span] * key_value + head) * capacity * HEAD + lane * OWN;
    float key[ROUNDS][OWN], value[ROUNDS][OWN], queries[GROUP][OWN];
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
        size_t position = min(begin + (round * WARPS + warp) * KEYS_PER_WARP + own, end - 1);
        load(key[round], keys + cached + position * HEAD);
        load(value[round], values + cached + position * HEAD);
    }
#pragma unroll
    for (int q = 0; q < GROUP; q++) load(queries[q], row + q * HEAD + lane * OWN);
#pragma unroll
    for (int q = 0; q < GROUP; q++) {
        Weighted all = {negative_infinity(), 0, {}};
#pragma unroll
        for (int round = 0; round < ROUNDS; round++) {
            float score = 0;
#pragma unroll
            for (int i = 0; i < OWN; i++) score += queries[q][i] * key[round][i];
            score = lanes_sum<LANES>(score) * scale;
            if (begin + (round * WARPS + warp) * KEYS_PER_WARP + own < end) {
                Weighted one = {score, 1, {}};
#pragma unroll
                for (int i = 0; i < OWN; i++) one.x[i] = value[round][i];
                join(all, one);
            }
        }
#pragma unroll
        for (int step = LANES; step < WARP; step *= 2) {
            Weighted other = {__shfl_xor_sync(ALL_LANES, all.most, step), __shfl_xor_sync(ALL_LANES, all.sum, step), {}};
#pragma unroll
            for (int i = 0; i < OWN; i++) other.x[i] = __shfl_xor_sync(ALL_LANES, all.x[i], step);
            join(all, other);
        }
        if (own == 0) shared[warp][q][lane] = all;
    }
    __syncthreads();
    for (int at = threadIdx.x; at < GROUP * LANES; at += WARPS * WARP) {
        Weighted all = shared[0][at / LANES][at % LANES];
        for (int w = 1; w < WARPS; w++) join(all, shared[w][at / LANES][at % LANES]);
        size_t query_head = (size_t)span * query + head * GROUP + at / LANES;
        float *part = parts + (query_head * gridDim.x + blockIdx.x) * (HEAD + 2);
        if (at % LANES == 0) {
            part[0] = all.most;
            part[1] = all.sum;
        }
        for (int i = 0; i < OWN; i++) part[2 + at % LANES * OWN + i] = all.x[i];
    }
}

// Joins the chunks, with the grid (query heads, spans) and a thread per element of a head.
extern "C" __global__ void __launch_bounds__(HEAD)
    join_chunks(act *out, const float *parts, const unsigned *first, int chunks) {
    begin_kernel();
    size_t query_head = (size_t)blockIdx.y * gridDim.x + blockIdx.x;
    const float *part = parts + query_head * chunks * (HEAD + 2);
    int count = first[blockIdx.y] / CHUNK + 1;
    float most = negative_infinity(), sum = 0, x = 0;
    for (int chunk = 0; chunk < count; chunk++) most = fmaxf(most, part[chunk * (HEAD + 2)]);
    for (int chunk = 0; chunk < count; chunk++) {
        const float *own = part + chunk * (HEAD + 2);
        float weight = expf(own[0] - most);
        sum += own[1] * weight;
        x += own[2 + threadIdx.x] * weight;
    }
    put(out[query_head * HEAD + threadIdx.x], x / sum);
}
#endif
