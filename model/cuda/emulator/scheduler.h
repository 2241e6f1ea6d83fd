// Runs the blocks of a launch on CPU threads, and the threads of a block as fibers of one CPU thread.
#pragma once

#include <cstddef>

#include "abi.h"

namespace ulmus {

constexpr unsigned WARP = 32;
constexpr unsigned MAX_BLOCK = 1024;
constexpr unsigned MAX_SHARED = 232448;

// Where a module's `__shared__` variables are: its thread-local storage.
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

// Returns when all blocks are done. A mistake in the kernel ends the process with a message.
void run(const Launch &launch);

// Names what the calling CPU thread does, for the message of a memory fault, as long as the object lives.
class Activity {
  public:
    explicit Activity(const char *name);
    ~Activity();

  private:
    const char *outer_;
};

// Says what memory is near `address`, if any; set by the part that allocates. Called from a signal handler.
extern void (*describe_address)(const void *address, char *text, std::size_t size);

} // namespace ulmus
