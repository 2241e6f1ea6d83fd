// How the emulated libraries put work on a stream of the emulated driver: through its symbols `ulmus_emulator_enqueue`
// and `ulmus_emulator_occupy`.
#pragma once

#include <chrono>
#include <functional>
#include <future>
#include <vector>

namespace ulmus {

// Runs `work` now or, during a capture of `stream`, with each launch of the graph. Returns a CUresult. `name` must
// never be freed.
using Enqueue = int (*)(void *stream, const char *name, std::function<void()> work);

// Work of another library. It becomes ready, with the time, when the work is done.
using Occupation = std::shared_future<std::chrono::steady_clock::time_point>;

// Makes later work on `stream` wait for `occupation`, which itself has to wait for everything that is put into
// `before`. Returns a CUresult.
using Occupy = int (*)(void *stream, Occupation occupation, std::vector<Occupation> *before);

} // namespace ulmus
