// Causal attention with grouped queries in bfloat16 on tensor cores, forward and backward: FlashAttention-2 (Dao 2023),
// divided so that no sum depends on timing. The scores of a block of queries and a block of keys exist only in
// registers.
//
// A warp has TILES tiles of 16 rows. Rows are queries in the forward pass and for the gradient of queries, and keys for
// the gradients of keys and values. Where rows are queries, columns are keys, and vice versa. Blocks of columns pass
// through shared memory; the next one is loaded while the warps work on the current one.
//
// HEAD: width of a head, 64 or 128. TILES, WARPS: shape of a block of rows. COLUMNS: columns in shared memory at a time.
#include "common.cuh"

constexpr int THREADS = WARPS * WARP;
constexpr int ROWS = WARPS * TILES * 16;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// Rows of heads: row r of sequence s and head h begins at base + s * sequence + h * head + r * row.
struct Heads {
    bf16 *base;
    long long sequence, head, row;

    DEVICE bf16 *at(int s, int h) const { return base + s * sequence + h * head; }
};

// Tiles [rows, HEAD] in shared memory. Chunks of 8 numbers are permuted within a row, so that the same chunk of 8 rows
// is in 8 different banks.
DEVICE bf16 *chunk(bf16 *tile, int row, int index) { return tile + row * HEAD + ((index ^ (row & 7)) * 8); }

// Begins to load the rows first..first + COUNT. Rows from `limit` on become 0.
template <int COUNT>
DEVICE void load_rows(bf16 *tile, const bf16 *rows, long long stride, int first, int limit) {
    constexpr int CHUNKS = HEAD / 8;
    static_assert(COUNT * CHUNKS % THREADS == 0, "all threads have the same number of chunks");
#pragma unroll
    for (int i = 0; i < COUNT * CHUNKS / THREADS; i++) {
        int at = i * THREADS + threadIdx.x, row = at / CHUNKS, index = at % CHUNKS;
        bool valid = first + row < limit;
        const bf16 *from = rows + (valid ? (long long)(first + row) * stride + index * 8 : 0);
        copy_async(chunk(tile, row, index), from, valid);
    }
}

// The left operand [16, 16] at row `row`, column 16 * step of a tile.
DEVICE void load_left(unsigned (&a)[4], bf16 *tile, int row, int step) {
    int lane = threadIdx.x % WARP;
    load_tiles(a, chunk(tile, row + lane % 16, step * 2 + lane / 16));
}

// acc += left . right^T for each tile of 16 rows, where rows of `right` are the columns of the result.
template <int M, int N, class Left>
DEVICE void multiply_rows(float (&acc)[M][N / 8][4], Left left, bf16 *right) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = 0; step < HEAD / 16; step++) {
        unsigned a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) left(a[m], m, step);
#pragma unroll
        for (int n = 0; n < N / 16; n++) {
            unsigned b[4];
            load_tiles(b, chunk(right, n * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(acc[m][2 * n], a[m], {b[0], b[1]});
                mma_bf16(acc[m][2 * n + 1], a[m], {b[2], b[3]});
            }
        }
    }
}

// acc += left . right for each tile of 16 rows, where `left` [16, K] are results of another product, rounded.
template <int M, int K>
DEVICE void multiply_columns(float (&acc)[M][HEAD / 8][4], const float (&left)[M][K / 8][4], bf16 *right) {
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int step = 0; step < K / 16; step++) {
        unsigned a[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) {
            const float(&low)[4] = left[m][2 * step], (&high)[4] = left[m][2 * step + 1];
            a[m][0] = bf16x2_from_floats(low[0], low[1]);
            a[m][1] = bf16x2_from_floats(low[2], low[3]);
            a[m][2] = bf16x2_from_floats(high[0], high[1]);
            a[m][3] = bf16x2_from_floats(high[2], high[3]);
        }
#pragma unroll
        for (int n = 0; n < HEAD / 16; n++) {
            unsigned b[4];
            load_tiles_transposed(b, chunk(right, step * 16 + lane % 16, n * 2 + lane / 16));
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma_bf16(acc[m][2 * n], a[m], {b[0], b[1]});
                mma_bf16(acc[m][2 * n + 1], a[m], {b[2], b[3]});
            }
        }
    }
}

template <int M, int N>
DEVICE void clear(float (&acc)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc[m][n][i] = 0;
}

// The position of this thread's results in a tile of 16 rows: rows own_row(0) and own_row(1), columns 8 n +
// own_column() and the next.
DEVICE int own_row(int half) { return threadIdx.x % WARP / 4 + 8 * half; }
DEVICE int own_column() { return threadIdx.x % 4 * 2; }

// Replaces the scores of hidden pairs. Most blocks have none, and checking takes as long as the products.
template <int M, int N, class Hidden>
DEVICE void hide(float (&results)[M][N][4], float by, Hidden hidden) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (hidden(m, i / 2, n * 8 + own_column() + i % 2)) results[m][n][i] = by;
}

// Whether any queries of this warp, the first of which is at `position`, see any of the keys begin..begin + COLUMNS.
// `start` is the first key that the thread's first query sees.
DEVICE bool sees_keys(int begin, int position, int start) {
    return begin < position + TILES * 16 && begin + COLUMNS > __shfl_sync(ALL_LANES, start, 0);
}

// Writes this thread's part of the rows [16, HEAD], with each row multiplied by its factor.
DEVICE void store_rows(bf16 *rows, long long stride, int first, int limit, const float (&acc)[HEAD / 8][4],
                       float factor_low, float factor_high) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = first + own_row(half);
        float factor = half ? factor_high : factor_low;
        if (row < limit)
#pragma unroll
            for (int n = 0; n < HEAD / 8; n++) {
                unsigned pair = bf16x2_from_floats(acc[n][2 * half] * factor, acc[n][2 * half + 1] * factor);
                *reinterpret_cast<unsigned *>(rows + row * stride + n * 8 + own_column()) = pair;
            }
    }
}

// Output and logsumexp of the scaled scores. The keys of span s are those of sequence sequences[s] (s, if null) up to
// position first[s] + length (first[s] is 0, if null), and its queries are at the last `length` of these positions. A
// query sees the keys from doc_starts[its row] (0, if null) to its own position. The grid is (heads, blocks of queries,
// spans), so that blocks with the most keys begin first, and heads share the cache.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention(Heads out, float *lse, Heads queries, Heads keys, Heads values, const unsigned *doc_starts,
              const unsigned *sequences, const unsigned *first, int length, int group, float scale) {
    begin_kernel();
    DYNAMIC_SHARED(shared);
    bf16 *query_tile = reinterpret_cast<bf16 *>(shared);
    bf16 *key_tiles = query_tile + ROWS * HEAD, *value_tiles = key_tiles + 2 * COLUMNS * HEAD;
    int block = gridDim.y - 1 - blockIdx.y, head = blockIdx.x, span = blockIdx.z;
    int sequence = sequences ? sequences[span] : span;
    int offset = first ? first[span] : 0;
    int begin = block * ROWS, end = min(length, begin + ROWS);
    const bf16 *key = keys.at(sequence, head / group), *value = values.at(sequence, head / group);
    const unsigned *starts = doc_starts ? doc_starts + (long long)span * length : 0;
    int first_key = starts ? starts[begin] / COLUMNS * COLUMNS : 0;
    int last_start = starts ? starts[end - 1] : 0;
    int limit = offset + end;
    int warp_row = threadIdx.x / WARP * TILES * 16;

    load_rows<ROWS>(query_tile, queries.at(span, head), queries.row, begin, length);
    load_rows<COLUMNS>(key_tiles, key, keys.row, first_key, limit);
    load_rows<COLUMNS>(value_tiles, value, values.row, first_key, limit);
    copy_async_commit();

    unsigned query[TILES][HEAD / 16][4];
    float acc[TILES][HEAD / 8][4], most[TILES][2], sum[TILES][2];
    clear(acc);
    int start[TILES][2];
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            most[m][half] = negative_infinity();
            sum[m][half] = 0;
            int row = begin + warp_row + m * 16 + own_row(half);
            start[m][half] = starts ? starts[min(row, length - 1)] : 0;
        }
    float scale_log2 = scale * LOG2_E;
    for (int key_begin = first_key, stage = 0; key_begin < limit; key_begin += COLUMNS, stage ^= 1) {
        copy_async_wait<0>();
        // All threads have the current block, and are done with the previous one, which the next one replaces.
        __syncthreads();
        if (key_begin == first_key)
#pragma unroll
            for (int m = 0; m < TILES; m++)
#pragma unroll
                for (int step = 0; step < HEAD / 16; step++)
                    load_left(query[m][step], query_tile, warp_row + m * 16, step);
        int next = key_begin + COLUMNS;
        if (next < limit) {
            load_rows<COLUMNS>(key_tiles + (stage ^ 1) * COLUMNS * HEAD, key, keys.row, next, limit);
            load_rows<COLUMNS>(value_tiles + (stage ^ 1) * COLUMNS * HEAD, value, values.row, next, limit);
        }
        copy_async_commit();

        // With wide heads there are no registers left for this check.
        if (HEAD == 64 && !sees_keys(key_begin, offset + begin + warp_row, start[0][0])) continue;
        float scores[TILES][COLUMNS / 8][4];
        clear(scores);
        auto left = [&](unsigned(&a)[4], int m, int step) {
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = query[m][step][i];
        };
        multiply_rows<TILES, COLUMNS>(scores, left, key_tiles + stage * COLUMNS * HEAD);
        if (next > offset + begin + 1 || key_begin < last_start)
            hide(scores, negative_infinity(), [&](int m, int half, int column) {
                int position = offset + begin + warp_row + m * 16 + own_row(half), at = key_begin + column;
                return at > position || at < start[m][half];
            });
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float greatest = most[m][half];
#pragma unroll
                for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; i++) greatest = fmaxf(greatest, scores[m][n][i]);
                greatest = lanes_max<4>(greatest);
                // The row may not have seen any key yet.
                float shift = greatest == negative_infinity() ? 0 : greatest * scale_log2;
                float factor = exp2_fast(most[m][half] * scale_log2 - shift);
                float total = 0;
#pragma unroll
                for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; i++) {
                        scores[m][n][i] = exp2_fast(fmaf(scores[m][n][i], scale_log2, -shift));
                        total += scores[m][n][i];
                    }
                sum[m][half] = sum[m][half] * factor + total;
                most[m][half] = greatest;
#pragma unroll
                for (int n = 0; n < HEAD / 8; n++)
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; i++) acc[m][n][i] *= factor;
            }
        multiply_columns<TILES, COLUMNS>(acc, scores, value_tiles + stage * COLUMNS * HEAD);
    }

#pragma unroll
    for (int m = 0; m < TILES; m++) {
        float factors[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = lanes_sum<4>(sum[m][half]);
            factors[half] = 1.0f / total;
            int row = begin + warp_row + m * 16 + own_row(half);
            if (lse && row < length && threadIdx.x % 4 == 0)
                lse[((long long)span * gridDim.x + head) * length + row] = most[m][half] * scale + log2f(total) * LN_2;
        }
        store_rows(out.at(span, head), out.row, begin + warp_row + m * 16, length, acc[m], factors[0], factors[1]);
    }
}

// The sum of out * gradient over each head, [sequences, heads, length], with 8 lanes per head. The grid is (blocks of
// rows, heads, sequences).
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_delta(float *delta, Heads out, Heads gradient, int length) {
    begin_kernel();
    int row = blockIdx.x * (THREADS / 8) + threadIdx.x / 8;
    float sum = 0;
    if (row < length)
        for (int column = threadIdx.x % 8 * 8; column < HEAD; column += 64) {
            float a[8], b[8];
            load(a, out.at(blockIdx.z, blockIdx.y) + row * out.row + column);
            load(b, gradient.at(blockIdx.z, blockIdx.y) + row * gradient.row + column);
#pragma unroll
            for (int i = 0; i < 8; i++) sum += a[i] * b[i];
        }
    sum = lanes_sum<8>(sum);
    if (row < length && threadIdx.x % 8 == 0)
        delta[((long long)blockIdx.z * gridDim.y + blockIdx.y) * length + row] = sum;
}

// The probability of a score, where `lse_log2` is the logsumexp to base 2. The score's gradient is p (dp - delta).
DEVICE float probability(float score, float scale_log2, float lse_log2) {
    return exp2_fast(fmaf(score, scale_log2, -lse_log2));
}

// The gradient of the queries. The grid is (heads, blocks of queries, sequences).
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_backward_queries(Heads query_gradient, Heads gradient, const float *lse, const float *delta,
                               Heads queries, Heads keys, Heads values, const unsigned *doc_starts, int length,
                               int group, float scale) {
    begin_kernel();
    DYNAMIC_SHARED(shared);
    bf16 *query_tile = reinterpret_cast<bf16 *>(shared), *gradient_tile = query_tile + ROWS * HEAD;
    bf16 *key_tiles = gradient_tile + ROWS * HEAD, *value_tiles = key_tiles + 2 * COLUMNS * HEAD;
    int block = gridDim.y - 1 - blockIdx.y, head = blockIdx.x, sequence = blockIdx.z;
    int begin = block * ROWS, end = min(length, begin + ROWS);
    const bf16 *key = keys.at(sequence, head / group), *value = values.at(sequence, head / group);
    const unsigned *starts = doc_starts + (long long)sequence * length;
    int first_key = starts[begin] / COLUMNS * COLUMNS, last_start = starts[end - 1];
    int warp_row = threadIdx.x / WARP * TILES * 16;

    load_rows<ROWS>(query_tile, queries.at(sequence, head), queries.row, begin, length);
    load_rows<ROWS>(gradient_tile, gradient.at(sequence, head), gradient.row, begin, length);
    load_rows<COLUMNS>(key_tiles, key, keys.row, first_key, end);
    load_rows<COLUMNS>(value_tiles, value, values.row, first_key, end);
    copy_async_commit();

    long long of_head = ((long long)sequence * gridDim.x + head) * length;
    float acc[TILES][HEAD / 8][4], row_lse[TILES][2], row_delta[TILES][2];
    int start[TILES][2];
    clear(acc);
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = min(begin + warp_row + m * 16 + own_row(half), length - 1);
            row_lse[m][half] = lse[of_head + row] * LOG2_E;
            row_delta[m][half] = delta[of_head + row];
            start[m][half] = starts[row];
        }
    float scale_log2 = scale * LOG2_E;
    for (int key_begin = first_key, stage = 0; key_begin < end; key_begin += COLUMNS, stage ^= 1) {
        copy_async_wait<0>();
        __syncthreads();
        int next = key_begin + COLUMNS;
        if (next < end) {
            load_rows<COLUMNS>(key_tiles + (stage ^ 1) * COLUMNS * HEAD, key, keys.row, next, end);
            load_rows<COLUMNS>(value_tiles + (stage ^ 1) * COLUMNS * HEAD, value, values.row, next, end);
        }
        copy_async_commit();

        if (!sees_keys(key_begin, begin + warp_row, start[0][0])) continue;
        bf16 *own_keys = key_tiles + stage * COLUMNS * HEAD, *own_values = value_tiles + stage * COLUMNS * HEAD;
        float scores[TILES][COLUMNS / 8][4], slopes[TILES][COLUMNS / 8][4];
        clear(scores);
        clear(slopes);
        multiply_rows<TILES, COLUMNS>(
            scores,
            [&](unsigned(&a)[4], int m, int step) { load_left(a, query_tile, warp_row + m * 16, step); }, own_keys);
        multiply_rows<TILES, COLUMNS>(
            slopes,
            [&](unsigned(&a)[4], int m, int step) { load_left(a, gradient_tile, warp_row + m * 16, step); },
            own_values);
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float p = probability(scores[m][n][i], scale_log2, row_lse[m][i / 2]);
                    slopes[m][n][i] = p * (slopes[m][n][i] - row_delta[m][i / 2]);
                }
        if (next > begin + 1 || key_begin < last_start)
            hide(slopes, 0, [&](int m, int half, int column) {
                int position = begin + warp_row + m * 16 + own_row(half), at = key_begin + column;
                return at > position || at < start[m][half];
            });
        multiply_columns<TILES, COLUMNS>(acc, slopes, own_keys);
    }
#pragma unroll
    for (int m = 0; m < TILES; m++)
        store_rows(query_gradient.at(sequence, head), query_gradient.row, begin + warp_row + m * 16, length, acc[m],
                   scale, scale);
}

constexpr int NO_KEY = 0x7fffffff;

// What the gradients of keys and values need from each query in a block of columns.
struct Queries {
    float lse_log2[COLUMNS], delta[COLUMNS];
    // The first key that the query sees, or NO_KEY if there is no such query.
    int start[COLUMNS];
};

// The gradients of keys and values. Rows are keys, and columns are the queries of all heads in a group that may see
// them, one head after the other. The grid is (key/value heads, sequences, blocks of keys): there are few blocks of
// keys, and the first ones take longest.
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_backward_keys(Heads key_gradient, Heads value_gradient, Heads gradient, const float *lse,
                            const float *delta, Heads queries, Heads keys, Heads values, const unsigned *doc_starts,
                            int length, int group, float scale) {
    begin_kernel();
    DYNAMIC_SHARED(shared);
    bf16 *key_tile = reinterpret_cast<bf16 *>(shared), *value_tile = key_tile + ROWS * HEAD;
    bf16 *query_tiles = value_tile + ROWS * HEAD, *gradient_tiles = query_tiles + 2 * COLUMNS * HEAD;
    int begin = blockIdx.z * ROWS, end = min(length, begin + ROWS), head = blockIdx.x, sequence = blockIdx.y;
    load_rows<ROWS>(key_tile, keys.at(sequence, head), keys.row, begin, length);
    load_rows<ROWS>(value_tile, values.at(sequence, head), values.row, begin, length);

    const unsigned *starts = doc_starts + (long long)sequence * length;
    int first_block = begin / COLUMNS, first_query = first_block * COLUMNS;
    // From the block on whose first query is in a document that begins after these keys, no query sees any of them.
    int blocks = (length + COLUMNS - 1) / COLUMNS;
    for (int least = first_block + 1; least < blocks;) {
        int middle = (least + blocks) / 2;
        if (starts[middle * COLUMNS] >= end)
            blocks = middle;
        else
            least = middle + 1;
    }
    blocks -= first_block;
    int warp_row = threadIdx.x / WARP * TILES * 16;

    auto load_block = [&](int index) {
        int query_head = head * group + index / blocks, at = first_query + index % blocks * COLUMNS;
        int place = index % 2 * COLUMNS * HEAD;
        load_rows<COLUMNS>(query_tiles + place, queries.at(sequence, query_head), queries.row, at, length);
        load_rows<COLUMNS>(gradient_tiles + place, gradient.at(sequence, query_head), gradient.row, at, length);
    };
    // One thread per query: its data is loaded before the work on the previous block, and stored after it.
    static_assert(COLUMNS <= THREADS, "there is a thread for each column");
    __shared__ __align__(16) Queries stages[2];
    float next_lse = 0, next_delta = 0;
    int next_start = 0;
    auto load_queries = [&](int index) {
        if (threadIdx.x >= COLUMNS) return;
        int query_head = head * group + index / blocks, at = first_query + index % blocks * COLUMNS + threadIdx.x;
        long long place = ((long long)sequence * gridDim.x * group + query_head) * length + min(at, length - 1);
        next_lse = lse[place];
        next_delta = delta[place];
        next_start = at < length ? starts[at] : NO_KEY;
    };
    auto put_queries = [&](int index) {
        if (threadIdx.x >= COLUMNS) return;
        Queries &stage = stages[index % 2];
        stage.lse_log2[threadIdx.x] = next_lse * LOG2_E;
        stage.delta[threadIdx.x] = next_delta;
        stage.start[threadIdx.x] = next_start;
    };
    load_block(0);
    copy_async_commit();
    load_queries(0);
    put_queries(0);

    float key_acc[TILES][HEAD / 8][4], value_acc[TILES][HEAD / 8][4];
    clear(key_acc);
    clear(value_acc);
    float scale_log2 = scale * LOG2_E;
    for (int index = 0; index < group * blocks; index++) {
        copy_async_wait<0>();
        __syncthreads();
        bool more = index + 1 < group * blocks;
        if (more) {
            load_block(index + 1);
            load_queries(index + 1);
        }
        copy_async_commit();

        int query_begin = first_query + index % blocks * COLUMNS;
        const Queries &block = stages[index % 2];
        bf16 *own_queries = query_tiles + index % 2 * COLUMNS * HEAD;
        bf16 *own_gradient = gradient_tiles + index % 2 * COLUMNS * HEAD;
        // A warp skips the block if none of these queries sees any of its keys.
        if (query_begin + COLUMNS > begin + warp_row && block.start[0] < begin + warp_row + TILES * 16) {
            float scores[TILES][COLUMNS / 8][4], slopes[TILES][COLUMNS / 8][4];
            clear(scores);
            clear(slopes);
            multiply_rows<TILES, COLUMNS>(
                scores, [&](unsigned(&a)[4], int m, int step) { load_left(a, key_tile, warp_row + m * 16, step); },
                own_queries);
            multiply_rows<TILES, COLUMNS>(
                slopes, [&](unsigned(&a)[4], int m, int step) { load_left(a, value_tile, warp_row + m * 16, step); },
                own_gradient);
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++) {
                float2 lse = *reinterpret_cast<const float2 *>(&block.lse_log2[n * 8 + own_column()]);
#pragma unroll
                for (int m = 0; m < TILES; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        scores[m][n][i] = probability(scores[m][n][i], scale_log2, i % 2 ? lse.y : lse.x);
            }
            if (query_begin + 1 < end || block.start[COLUMNS - 1] > begin)
                hide(scores, 0, [&](int m, int half, int column) {
                    int at = begin + warp_row + m * 16 + own_row(half);
                    return at > query_begin + column || at < block.start[column];
                });
#pragma unroll
            for (int n = 0; n < COLUMNS / 8; n++) {
                float2 delta = *reinterpret_cast<const float2 *>(&block.delta[n * 8 + own_column()]);
#pragma unroll
                for (int m = 0; m < TILES; m++)
#pragma unroll
                    for (int i = 0; i < 4; i++)
                        slopes[m][n][i] = scores[m][n][i] * (slopes[m][n][i] - (i % 2 ? delta.y : delta.x));
            }
            multiply_columns<TILES, COLUMNS>(value_acc, scores, own_gradient);
            multiply_columns<TILES, COLUMNS>(key_acc, slopes, own_queries);
        }
        if (more) put_queries(index + 1);
    }
#pragma unroll
    for (int m = 0; m < TILES; m++) {
        int row = begin + warp_row + m * 16;
        store_rows(key_gradient.at(sequence, head), key_gradient.row, row, length, key_acc[m], scale, scale);
        store_rows(value_gradient.at(sequence, head), value_gradient.row, row, length, value_acc[m], 1, 1);
    }
}
