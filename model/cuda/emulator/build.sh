#!/bin/sh
# Builds the CUDA emulator: build.sh OUT_DIR. With OUT_DIR in LD_LIBRARY_PATH, programs that load libcuda, libnvrtc,
# libcublasLt and libnccl get these, and run their kernels on the CPU (x86-64 with AVX2). Kernels are compiled with g++,
# too.
set -eu

out=$1
source=$(dirname "$0")
mkdir -p "$out/include"
cp "$source/abi.h" "$source/device.h" "$source/intrinsics.cuh" "$out/include"

library() {
    name=$1
    shift
    # The library is built under another name first, because a process may be using the existing one.
    "${CXX:-g++}" -std=c++17 -O2 -Wall -Wextra -march=x86-64-v3 -fPIC -shared -fvisibility=hidden -pthread \
        -Wl,-z,defs -Wl,-soname,"$name" -o "$out/$name.new" "$@" -ldl
    mv "$out/$name.new" "$out/$name"
}

library libcuda.so "$source/driver.cpp" "$source/scheduler.cpp"
library libnvrtc.so "$source/nvrtc.cpp"
library libcublasLt.so "$source/cublaslt.cpp"
library libnccl.so.2 "$source/nccl.cpp"
