// Runs the blocks of a launch on CPU threads, and the threads of a block as fibers of one CPU thread.
#pragma once

#include <cstddef>

#include "abi.h"

namespace ulmus {

constexpr unsigned WARP = 32;
constexpr unsigned MAX_BLOCK = 1024;
constexpr unsigned MAX_SHARED = 232448;

// The location of a module's `__shared__` variables: its thread-local storage.
struct StaticShared {
    void *(*anchor)() = nullptr; // the address of one of them, for the calling CPU thread
    std::size_t anchor_offset = 0;
    std::size_t bytes = 0;
};

struct Launch {
    const Kernel *kernel;
    const char *name;
    void *const *parameters;
    Index grid, block;
    unsigned dynamic_shared;
    StaticShared static_shared;
};

// Runs a launch, and returns when all blocks are done. An error in the kernel ends the process with a message.
void run(const Launch &launch);

// As long as the object lives, names what the calling CPU thread is doing, for the message after a memory fault.
class Activity {
  public:
    explicit Activity(const char *name);
    ~Activity();

  private:
    const char *outer_;
};

// Describes the memory near `address`, if any. The part that allocates sets this function; a signal handler calls it.
extern void (*describe_address)(const void *address, char *text, std::size_t size);

} // namespace ulmus
