// How the emulated libraries put work on a stream of the emulated driver: through its symbol `ulmus_emulator_enqueue`.
#pragma once

#include <functional>

namespace ulmus {

// Runs `work` now or, if `stream` captures, with each launch of the graph. Gives a CUresult. `name` lives for ever.
using Enqueue = int (*)(void *stream, const char *name, std::function<void()> work);

} // namespace ulmus
