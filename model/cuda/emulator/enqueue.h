// How the emulated libraries put work on a stream of the emulated driver: through its symbols `ulmus_emulator_enqueue`
// and `ulmus_emulator_occupy`.
#pragma once

#include <chrono>
#include <functional>
#include <future>
#include <vector>

namespace ulmus {

// Runs `work` now or, if `stream` captures, with each launch of the graph. Gives a CUresult. `name` lives for ever.
using Enqueue = int (*)(void *stream, const char *name, std::function<void()> work);

// Work that somebody else does: ready when it is done, with the time of that.
using Occupation = std::shared_future<std::chrono::steady_clock::time_point>;

// What comes after on `stream` waits for `occupation`, which has to wait for what this puts into `before`. Gives a
// CUresult.
using Occupy = int (*)(void *stream, Occupation occupation, std::vector<Occupation> *before);

} // namespace ulmus
