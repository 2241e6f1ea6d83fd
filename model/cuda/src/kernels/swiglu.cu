// SwiGLU: out = silu(gate) * up, where a row holds all gates and then all ups.
#include "common.cuh"

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// The forward pass, with a thread per vector of a row and the grid (rows, vectors).
extern "C" __global__ void swiglu(act *out, const act *x, int width) {
    begin_kernel();
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * VEC;
    if (column >= width) return;
    const act *row = x + (size_t)blockIdx.x * 2 * width + column;
    float gate[VEC], up[VEC];
    load(gate, row);
    load(up, row + width);
#pragma unroll
    for (int i = 0; i < VEC; i++) up[i] *= gate[i] * sigmoid(gate[i]);
    store(out + (size_t)blockIdx.x * width + column, up);
}

// Replaces gates and ups by their gradients, and the gradient of the output by the output.
extern "C" __global__ void swiglu_backward(act *x, act *gradient, int width) {
    begin_kernel();
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * VEC;
    if (column >= width) return;
    act *row = x + (size_t)blockIdx.x * 2 * width + column;
    gradient += (size_t)blockIdx.x * width + column;
    float gate[VEC], up[VEC], upstream[VEC], out[VEC];
    load(gate, row);
    load(up, row + width);
    load(upstream, gradient);
#pragma unroll
    for (int i = 0; i < VEC; i++) {
        float s = sigmoid(gate[i]), g = upstream[i];
        out[i] = up[i] * (gate[i] * s);
        upstream[i] = g * up[i] * s * (1.0f + gate[i] * (1.0f - s));
        up[i] = g * gate[i] * s;
    }
    store(row, upstream);
    store(row + width, up);
    store(gradient, out);
}
