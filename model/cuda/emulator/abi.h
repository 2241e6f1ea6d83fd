// The interface between the emulated driver and a compiled kernel module: the module describes its kernels, and the
// driver gives every thread that it runs a `Thread`, and functions with which threads wait for one another.
#pragma once

namespace ulmus {

struct Index {
    unsigned x, y, z;
};

// Executes a collective operation of a warp when all lanes of `mask` have arrived. `arguments[lane]` is what that lane
// has passed. The function also identifies the operation: lanes that wait for one another must have passed the same
// one.
using Combine = void (*)(void *const *arguments, unsigned mask);

struct Thread;

struct Services {
    // Waits for all threads of the block that have not returned. Returns how many of them have passed true.
    unsigned (*block_barrier)(Thread &thread, const char *operation, bool predicate);
    void (*collective)(Thread &thread, const char *operation, unsigned mask, Combine combine, void *arguments);
    // Copies 16 bytes, as late as the thread's waits allow.
    void (*copy_begin)(Thread &thread, void *to, const void *from, bool valid);
    void (*copy_commit)(Thread &thread);
    void (*copy_wait)(Thread &thread, unsigned groups_left);
    // Ends the process with a message that names kernel, block and thread.
    [[noreturn]] void (*fail)(const char *message);
};

// The part of a thread's state that kernels read. While a thread runs, register r15 holds its address.
struct Thread {
    Index thread_index, block_index, block_size, grid_size;
    unsigned lane;
    unsigned char *dynamic_shared;
    const Services *services;
};

// The description of a kernel. A module has one for each, as the symbol `ulmus_kernel_<name>`.
struct Kernel {
    void (*call)(void *const *parameters);
    const unsigned *parameter_sizes;
    unsigned parameter_count;
    unsigned max_threads; // from __launch_bounds__, or 0 without it
};

} // namespace ulmus
