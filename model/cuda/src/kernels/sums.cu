// Sums of rows of partial sums, in an order that depends only on the shape.
#include "common.cuh"

constexpr int COLUMNS = 32;
constexpr int PARTS = 32;

// out[c] = sum of partial[r][c], with a block of COLUMNS x PARTS threads per COLUMNS columns.
extern "C" __global__ void __launch_bounds__(COLUMNS *PARTS)
    sum_rows(float *out, const float *partial, int rows, int width) {
    begin_kernel();
    __shared__ float shared[PARTS][COLUMNS];
    int column = blockIdx.x * COLUMNS + threadIdx.x;
    int per_part = (rows + PARTS - 1) / PARTS;
    int begin = threadIdx.y * per_part, end = min(rows, begin + per_part);
    float sum = 0;
    if (column < width)
        for (int row = begin; row < end; row++) sum += partial[(size_t)row * width + column];
    shared[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && column < width) {
        float total = 0;
        for (int part = 0; part < PARTS; part++) total += shared[part][threadIdx.x];
        out[column] = total;
    }
}
