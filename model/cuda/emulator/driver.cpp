// libcuda for machines without a GPU: the part of the driver API that our CUDA backend calls.
//
// Device memory is memory of the process, device pointers are addresses, and modules are shared objects from the
// emulated NVRTC. Work on a stream is done before the call returns, except during a capture. Operations of the emulated
// NCCL occupy the stream until they are done, and calls that put other work there wait for them.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include "enqueue.h"
#include "scheduler.h"

#define API extern "C" __attribute__((visibility("default")))

enum CUresult : unsigned {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_NO_DEVICE = 100,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_IMAGE = 200,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_ILLEGAL_STATE = 401,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_NOT_SUPPORTED = 801,
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901,
    CUDA_ERROR_STREAM_CAPTURE_MERGE = 902,
    CUDA_ERROR_STREAM_CAPTURE_UNMATCHED = 903,
    CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD = 908,
    CUDA_ERROR_CAPTURED_EVENT = 907,
};

using CUdevice = int;
using CUdeviceptr = unsigned long long;

// Returns early with a result that is not a success.
#define TRY(expression)                                                                                                \
    if (CUresult result_ = (expression)) return result_

namespace {

constexpr std::size_t PAGE = 4096;
constexpr std::size_t DEVICE_BYTES = std::size_t(8) << 30;
constexpr std::size_t HOST_BYTES = std::size_t(64) << 20; // page-locked
constexpr int MAX_SHARED_WITHOUT_REQUEST = 48 * 1024;
constexpr int MULTIPROCESSORS = 4;
constexpr std::chrono::milliseconds COPY_DELAY(20);

std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

// ---- memory

// All allocations. Each is followed by a guard page, beginning at the next multiple of 16 bytes, and preceded by one.
class Memory {
  public:
    enum Kind { DEVICE, HOST };

    CUresult allocate(Kind kind, std::size_t bytes, void **memory) {
        if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
        std::lock_guard lock(mutex_);
        std::size_t limit = kind == DEVICE ? DEVICE_BYTES : HOST_BYTES;
        if (bytes > limit || used_[kind] + bytes > limit) return CUDA_ERROR_OUT_OF_MEMORY;
        std::size_t pages = round_up(bytes, PAGE);
        void *area =
            mmap(nullptr, pages + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (area == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
        char *first_page = static_cast<char *>(area) + PAGE;
        if (mprotect(first_page, pages, PROT_READ | PROT_WRITE) != 0) {
            munmap(area, pages + 2 * PAGE);
            return CUDA_ERROR_OUT_OF_MEMORY;
        }
        // Fills the memory with NaN, to expose reads of memory that was never written.
        std::memset(first_page, 0xFF, pages);
        char *begin = first_page + pages - round_up(bytes, 16);
        blocks_[begin] = {kind, bytes, area, pages + 2 * PAGE};
        used_[kind] += bytes;
        *memory = begin;
        return CUDA_SUCCESS;
    }

    CUresult release(Kind kind, void *memory) {
        if (!memory) return CUDA_SUCCESS;
        std::lock_guard lock(mutex_);
        auto found = blocks_.find(static_cast<char *>(memory));
        if (found == blocks_.end() || found->second.kind != kind) return CUDA_ERROR_INVALID_VALUE;
        used_[kind] -= found->second.bytes;
        munmap(found->second.area, found->second.area_bytes);
        blocks_.erase(found);
        return CUDA_SUCCESS;
    }

    // Whether all bytes belong to one allocation of this kind.
    bool contains(Kind kind, const void *address, std::size_t bytes) {
        std::lock_guard lock(mutex_);
        auto first = static_cast<char *>(const_cast<void *>(address));
        auto next = blocks_.upper_bound(first);
        if (next == blocks_.begin()) return false;
        const auto &[begin, block] = *std::prev(next);
        std::size_t offset = first - begin;
        return block.kind == kind && offset <= block.bytes && bytes <= block.bytes - offset;
    }

    std::size_t available() {
        std::lock_guard lock(mutex_);
        return DEVICE_BYTES - used_[DEVICE];
    }

    // Describes an address for a message when the process is about to end. Works without the lock if it is held.
    void describe(const void *address, char *text, std::size_t size) {
        std::unique_lock lock(mutex_, std::try_to_lock);
        auto target = static_cast<const char *>(address);
        for (const auto &[begin, block] : blocks_) {
            auto area = static_cast<const char *>(block.area);
            if (target < area || target >= area + block.area_bytes) continue;
            const char *kind = block.kind == DEVICE ? "device" : "host";
            std::snprintf(text, size, ": at byte %td of %zu bytes of %s memory", target - begin, block.bytes, kind);
        }
    }

  private:
    struct Block {
        Kind kind;
        std::size_t bytes;
        void *area;
        std::size_t area_bytes;
    };

    std::mutex mutex_;
    std::map<char *, Block> blocks_;
    std::size_t used_[2] = {};
};

Memory &memory() {
    static Memory &all = *new Memory;
    return all;
}

// ---- handles

// Objects that callers identify by their addresses.
template <class T>
class Handles {
  public:
    T *add(std::shared_ptr<T> object) {
        std::lock_guard lock(mutex_);
        T *handle = object.get();
        objects_[handle] = std::move(object);
        return handle;
    }

    // Null if there is no such handle.
    std::shared_ptr<T> find(const void *handle) {
        std::lock_guard lock(mutex_);
        auto found = objects_.find(handle);
        return found == objects_.end() ? nullptr : found->second;
    }

    CUresult remove(const void *handle) {
        std::lock_guard lock(mutex_);
        return objects_.erase(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
    }

    std::vector<std::shared_ptr<T>> all() {
        std::lock_guard lock(mutex_);
        std::vector<std::shared_ptr<T>> objects;
        for (auto &[handle, object] : objects_) objects.push_back(object);
        return objects;
    }

  private:
    std::mutex mutex_;
    std::unordered_map<const void *, std::shared_ptr<T>> objects_;
};

template <class T>
Handles<T> &handles() {
    static auto &all = *new Handles<T>;
    return all;
}

// ---- streams and graphs

struct Operation {
    const char *name;
    std::function<void()> run;
};

using Graph = std::vector<Operation>;

struct GraphExec {
    Graph operations;
};

enum CaptureMode { CAPTURE_GLOBAL = 0, CAPTURE_THREAD_LOCAL = 1, CAPTURE_RELAXED = 2 };

struct Stream;

struct Capture {
    const Stream *origin;
    CaptureMode mode;
    std::thread::id thread;
    std::atomic<bool> invalid{false}, ended{false};
    Graph operations;
};

// Operations of other libraries that are in progress.
class Occupations {
  public:
    bool ready() const {
        auto is_done = [](auto &one) { return one.wait_for(std::chrono::seconds(0)) == std::future_status::ready; };
        return std::all_of(all_.begin(), all_.end(), is_done);
    }

    void wait() const {
        for (auto &one : all_) one.wait();
    }

    // The time when the last operation is done, or `time` if that is later.
    std::chrono::steady_clock::time_point end(std::chrono::steady_clock::time_point time) const {
        for (auto &one : all_) time = std::max(time, one.get());
        return time;
    }

    const std::vector<ulmus::Occupation> &all() const { return all_; }

    void add(const std::vector<ulmus::Occupation> &others) {
        if (ready()) all_.clear();
        all_.insert(all_.end(), others.begin(), others.end());
    }

  private:
    std::vector<ulmus::Occupation> all_;
};

struct Context;

struct Stream {
    const Context *context = nullptr; // null for the default streams
    std::shared_ptr<Capture> capture; // of this stream or of one whose event it waits for

    Capture *capturing() const { return capture && !capture->ended ? capture.get() : nullptr; }

    Occupations occupations() {
        std::lock_guard lock(mutex_);
        return occupations_;
    }

    // Returns the earlier occupations.
    std::vector<ulmus::Occupation> occupy(const std::vector<ulmus::Occupation> &others) {
        std::lock_guard lock(mutex_);
        auto before = occupations_.all();
        occupations_.add(others);
        return before;
    }

  private:
    std::mutex mutex_;
    Occupations occupations_;
};

struct Event {
    std::shared_ptr<Capture> capture; // in which the event was last recorded
    std::chrono::steady_clock::time_point time;
    Occupations occupations; // of the stream when the event was recorded
    bool recorded = false;
    bool timed = true;

    bool captured() const { return capture && !capture->ended; }
};

// The captures in progress.
class Captures {
  public:
    void add(std::shared_ptr<Capture> capture) {
        std::lock_guard lock(mutex_);
        active_.push_back(std::move(capture));
    }

    void remove(const Capture *capture) {
        std::lock_guard lock(mutex_);
        auto same = [=](auto &other) { return other.get() == capture; };
        active_.erase(std::remove_if(active_.begin(), active_.end(), same), active_.end());
    }

    // Checks a call that waits for the device. A capture's mode decides in which threads such calls are errors, which
    // also invalidate the capture.
    CUresult check_unsafe_call() {
        std::lock_guard lock(mutex_);
        CUresult result = CUDA_SUCCESS;
        for (auto &capture : active_) {
            bool forbidden = capture->mode == CAPTURE_GLOBAL ||
                             (capture->mode == CAPTURE_THREAD_LOCAL && capture->thread == std::this_thread::get_id());
            if (!forbidden) continue;
            capture->invalid = true;
            result = CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        }
        return result;
    }

  private:
    std::mutex mutex_;
    std::vector<std::shared_ptr<Capture>> active_;
};

Captures &captures() {
    static auto &all = *new Captures;
    return all;
}

// The default streams, 0 to 2, share one object.
std::shared_ptr<Stream> find_stream(const void *handle) {
    static auto &common = *new std::shared_ptr<Stream>(new Stream);
    return reinterpret_cast<std::uintptr_t>(handle) <= 2 ? common : handles<Stream>().find(handle);
}

CUresult enqueue(void *stream_handle, const char *name, std::function<void()> work) {
    auto stream = find_stream(stream_handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (Capture *capture = stream->capturing()) {
        if (capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        capture->operations.push_back({name, std::move(work)});
        return CUDA_SUCCESS;
    }
    stream->occupations().wait();
    ulmus::Activity running(name);
    work();
    return CUDA_SUCCESS;
}

// Waits for the work on all streams of a context.
void synchronize(const Context *context) {
    find_stream(nullptr)->occupations().wait();
    for (auto &stream : handles<Stream>().all())
        if (stream->context == context) stream->occupations().wait();
}

// ---- modules

struct Function;

struct Module {
    void *library = nullptr;
    ulmus::StaticShared static_shared;
    std::map<std::string, int> shared_sizes; // by the prefix of the names of a function's own variables
    std::mutex mutex;
    std::map<std::string, Function *> functions; // those that have been requested

    ~Module() {
        if (library) dlclose(library);
    }
};

struct Function {
    std::shared_ptr<Module> module;
    std::string name;
    const ulmus::Kernel *kernel;
    int static_shared;
    std::atomic<int> max_dynamic_shared{0};

    Function(std::shared_ptr<Module> from, const char *name, const ulmus::Kernel *kernel)
        : module(std::move(from)), name(name), kernel(kernel) {
        auto size = module->shared_sizes.find("_ZZ" + std::to_string(this->name.size()) + name);
        static_shared = size == module->shared_sizes.end() ? 0 : size->second;
    }

    // Maximum bytes of dynamic shared memory for a launch.
    int allowed_shared() const {
        return std::max<int>(max_dynamic_shared, MAX_SHARED_WITHOUT_REQUEST - static_shared);
    }
};

// A shared object in memory, of unknown length.
class Image {
  public:
    explicit Image(const void *bytes) : bytes_(static_cast<const char *>(bytes)) {}

    bool valid() const { return std::memcmp(bytes_, ELFMAG, SELFMAG) == 0 && header().e_machine == EM_X86_64; }

    std::size_t size() const {
        std::size_t end = header().e_shoff + header().e_shnum * sizeof(Elf64_Shdr);
        for (int i = 0; i < header().e_shnum; i++)
            if (section(i).sh_type != SHT_NOBITS) end = std::max(end, section(i).sh_offset + section(i).sh_size);
        return end;
    }

    // Bytes of the thread-local variables of each function. Variable `x` of function `f` has the symbol `_ZZ1fE1x`.
    std::map<std::string, int> shared_sizes() const {
        std::map<std::string, int> sizes;
        for (int i = 0; i < header().e_shnum; i++) {
            if (section(i).sh_type != SHT_SYMTAB) continue;
            const char *names = bytes_ + section(section(i).sh_link).sh_offset;
            auto symbols = reinterpret_cast<const Elf64_Sym *>(bytes_ + section(i).sh_offset);
            for (std::size_t k = 0; k < section(i).sh_size / sizeof(Elf64_Sym); k++) {
                std::string name = names + symbols[k].st_name;
                if (ELF64_ST_TYPE(symbols[k].st_info) == STT_TLS && name.rfind("_ZZ", 0) == 0)
                    sizes[name.substr(0, name.find('E'))] += symbols[k].st_size;
            }
        }
        return sizes;
    }

    bool write_to(int file) const {
        std::size_t length = size();
        for (std::size_t done = 0; done < length;) {
            ssize_t written = write(file, bytes_ + done, length - done);
            if (written < 0) return false;
            done += written;
        }
        return true;
    }

  private:
    const Elf64_Ehdr &header() const { return *reinterpret_cast<const Elf64_Ehdr *>(bytes_); }
    const Elf64_Shdr &section(int i) const {
        return reinterpret_cast<const Elf64_Shdr *>(bytes_ + header().e_shoff)[i];
    }

    const char *bytes_;
};

// Each load uses its own file, because the loader does not load the same file twice.
void *load_library(const Image &image) {
    const char *folder = std::getenv("TMPDIR");
    std::string path = std::string(folder ? folder : "/tmp") + "/emulated-module-XXXXXX";
    int file = mkstemp(path.data());
    if (file < 0) return nullptr;
    bool written = image.write_to(file);
    close(file);
    void *library = written ? dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (!library) std::fprintf(stderr, "emulator: cannot load a module: %s\n", dlerror());
    unlink(path.c_str());
    return library;
}

ulmus::StaticShared find_static_shared(void *library) {
    ulmus::StaticShared shared;
    shared.anchor = reinterpret_cast<void *(*)()>(dlsym(library, "ulmus_shared_anchor"));
    if (!shared.anchor) return shared;
    struct Search {
        char *anchor;
        ulmus::StaticShared &shared;
    } search = {static_cast<char *>(shared.anchor()), shared};
    dl_iterate_phdr(
        [](dl_phdr_info *info, std::size_t, void *data) {
            auto &[anchor, shared] = *static_cast<Search *>(data);
            char *storage = static_cast<char *>(info->dlpi_tls_data);
            for (int i = 0; i < info->dlpi_phnum; i++) {
                const Elf64_Phdr &part = info->dlpi_phdr[i];
                if (part.p_type != PT_TLS || !storage || anchor < storage || anchor >= storage + part.p_memsz) continue;
                shared.anchor_offset = anchor - storage;
                shared.bytes = part.p_memsz;
            }
            return 0;
        },
        &search);
    return shared;
}

// A launch with its own copy of the parameters.
class PreparedLaunch {
  public:
    PreparedLaunch(std::shared_ptr<Function> function, ulmus::Index grid, ulmus::Index block, unsigned dynamic_shared,
                   void *const *parameters)
        : function_(std::move(function)), grid_(grid), block_(block), dynamic_shared_(dynamic_shared) {
        const ulmus::Kernel &kernel = *function_->kernel;
        for (unsigned i = 0; i < kernel.parameter_count; i++) {
            auto bytes = static_cast<const unsigned char *>(parameters[i]);
            std::vector<Unit> value((kernel.parameter_sizes[i] + sizeof(Unit) - 1) / sizeof(Unit));
            std::memcpy(value.data(), bytes, kernel.parameter_sizes[i]);
            values_.push_back(std::move(value));
        }
    }

    void operator()() {
        std::vector<void *> parameters;
        for (auto &value : values_) parameters.push_back(value.data());
        ulmus::run({function_->kernel, function_->name.c_str(), parameters.data(), grid_, block_, dynamic_shared_,
                    function_->module->static_shared});
    }

  private:
    struct alignas(16) Unit {
        unsigned char bytes[16];
    };

    std::shared_ptr<Function> function_; // which, with its module, lives as long as a graph that contains it
    ulmus::Index grid_, block_;
    unsigned dynamic_shared_;
    std::vector<std::vector<Unit>> values_;
};

// ---- devices

std::atomic<bool> initialized{false};
struct Context {
    CUdevice device;
};
thread_local Context *current_context = nullptr;

int device_count() {
    const char *text = std::getenv("ULMUS_EMULATED_DEVICES");
    return text ? std::atoi(text) : 1;
}

Context *primary_context(CUdevice device) {
    static std::mutex mutex;
    static auto &contexts = *new std::map<CUdevice, Context>;
    std::lock_guard lock(mutex);
    return &contexts.try_emplace(device, Context{device}).first->second;
}

CUresult check_device(CUdevice device) {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    return device >= 0 && device < device_count() ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

CUresult check_context() {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    return current_context ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

int device_attribute(int attribute) {
    switch (attribute) {
    case 1: return ulmus::MAX_BLOCK; // threads per block
    case 2: case 3: return 1024;     // block, x and y
    case 4: return 64;               // block, z
    case 5: return 0x7FFFFFFF;       // grid, x
    case 6: case 7: return 65535;    // grid, y and z
    case 8: return MAX_SHARED_WITHOUT_REQUEST;
    case 10: return ulmus::WARP;
    case 12: case 82: return 65536; // registers per block and per multiprocessor
    case 16: return MULTIPROCESSORS;
    case 39: return 2048;   // threads per multiprocessor
    case 41: return 1;      // unified addressing
    case 75: return 9;      // compute capability
    case 76: return 0;      // its minor number
    case 81: return 233472; // shared memory per multiprocessor
    case 97: return ulmus::MAX_SHARED;
    default: return 0;
    }
}

// ---- checks of launches

CUresult check_launch(const Function &function, ulmus::Index grid, ulmus::Index block, unsigned dynamic_shared) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || block.x == 0 || block.y == 0 || block.z == 0)
        return CUDA_ERROR_INVALID_VALUE;
    if (grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535) return CUDA_ERROR_INVALID_VALUE;
    if (block.x > 1024 || block.y > 1024 || block.z > 64) return CUDA_ERROR_INVALID_VALUE;
    unsigned threads = block.x * block.y * block.z, bound = function.kernel->max_threads;
    if (threads > ulmus::MAX_BLOCK || (bound != 0 && threads > bound)) return CUDA_ERROR_INVALID_VALUE;
    return dynamic_shared > unsigned(function.allowed_shared()) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult launch(const Function *handle, ulmus::Index grid, ulmus::Index block, unsigned dynamic_shared, void *stream,
                void *const *parameters) {
    TRY(check_context());
    auto function = handles<Function>().find(handle);
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    TRY(check_launch(*function, grid, block, dynamic_shared));
    if (function->kernel->parameter_count > 0 && !parameters) return CUDA_ERROR_INVALID_VALUE;
    return enqueue(stream, function->name.c_str(), PreparedLaunch(function, grid, block, dynamic_shared, parameters));
}

struct ErrorText {
    CUresult code;
    const char *name, *text;
};

const ErrorText ERRORS[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "an argument is invalid"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "cuInit has not been called"},
    {CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "there is no device"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "there is no such device"},
    {CUDA_ERROR_INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "not a module for the emulator"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "the thread has no current context"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "no such object"},
    {CUDA_ERROR_ILLEGAL_STATE, "CUDA_ERROR_ILLEGAL_STATE", "not possible in this state"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "nothing has this name"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY", "some work is not done yet"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "not supported by the emulator"},
    {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "not allowed during a capture"},
    {CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
     "an earlier error has invalidated the capture"},
    {CUDA_ERROR_STREAM_CAPTURE_MERGE, "CUDA_ERROR_STREAM_CAPTURE_MERGE", "this would join two captures"},
    {CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
     "the capture did not begin in this stream"},
    {CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
     "the capture did not begin in this thread"},
    {CUDA_ERROR_CAPTURED_EVENT, "CUDA_ERROR_CAPTURED_EVENT", "the event was recorded in a stream during a capture"},
};

CUresult error_text(CUresult error, const char *ErrorText::*member, const char **text) {
    for (const ErrorText &known : ERRORS) {
        if (known.code != error) continue;
        *text = known.*member;
        return CUDA_SUCCESS;
    }
    *text = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

} // namespace

API int ulmus_emulator_enqueue(void *stream, const char *name, std::function<void()> work) {
    return enqueue(stream, name, std::move(work));
}

static_assert(std::is_same_v<decltype(&ulmus_emulator_enqueue), ulmus::Enqueue>);

API int ulmus_emulator_occupy(void *stream_handle, ulmus::Occupation occupation,
                              std::vector<ulmus::Occupation> *before) {
    auto stream = find_stream(stream_handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    if (Capture *capture = stream->capturing()) {
        capture->invalid = true;
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    *before = stream->occupy({std::move(occupation)});
    return CUDA_SUCCESS;
}

static_assert(std::is_same_v<decltype(&ulmus_emulator_occupy), ulmus::Occupy>);

// ---- errors

API CUresult cuGetErrorName(CUresult error, const char **text) { return error_text(error, &ErrorText::name, text); }
API CUresult cuGetErrorString(CUresult error, const char **text) { return error_text(error, &ErrorText::text, text); }

// ---- devices and contexts

API CUresult cuInit(unsigned) {
    if (device_count() < 1) return CUDA_ERROR_NO_DEVICE;
    ulmus::describe_address = [](const void *address, char *text, std::size_t size) {
        memory().describe(address, text, size);
    };
    initialized = true;
    return CUDA_SUCCESS;
}

API CUresult cuDriverGetVersion(int *version) {
    *version = 13000;
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGetCount(int *count) {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    *count = device_count();
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    TRY(check_device(ordinal));
    *device = ordinal;
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    TRY(check_device(device));
    std::snprintf(name, length, "Emulated GPU");
    return CUDA_SUCCESS;
}

API CUresult cuDeviceTotalMem_v2(std::size_t *bytes, CUdevice device) {
    TRY(check_device(device));
    *bytes = DEVICE_BYTES;
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
    TRY(check_device(device));
    *value = device_attribute(attribute);
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGetUuid(char (*uuid)[16], CUdevice device) {
    TRY(check_device(device));
    std::memcpy(*uuid, "ulmus emulator ", 16);
    (*uuid)[15] = char(device);
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGetUuid_v2(char (*uuid)[16], CUdevice device) { return cuDeviceGetUuid(uuid, device); }

API CUresult cuDevicePrimaryCtxRetain(Context **context, CUdevice device) {
    TRY(check_device(device));
    *context = primary_context(device);
    return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) { return check_device(device); }

API CUresult cuCtxSetCurrent(Context *context) {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    current_context = context;
    return CUDA_SUCCESS;
}

API CUresult cuCtxGetCurrent(Context **context) {
    if (!initialized) return CUDA_ERROR_NOT_INITIALIZED;
    *context = current_context;
    return CUDA_SUCCESS;
}

API CUresult cuCtxGetDevice(CUdevice *device) {
    TRY(check_context());
    *device = current_context->device;
    return CUDA_SUCCESS;
}

API CUresult cuCtxSynchronize_v2(Context *context) {
    TRY(captures().check_unsafe_call());
    synchronize(context);
    return CUDA_SUCCESS;
}

API CUresult cuCtxSynchronize() {
    TRY(check_context());
    return cuCtxSynchronize_v2(current_context);
}

API CUresult cuCtxSetLimit(int, std::size_t) { return check_context(); }

API CUresult cuCtxGetLimit(std::size_t *value, int) {
    TRY(check_context());
    *value = 0;
    return CUDA_SUCCESS;
}

// ---- memory

API CUresult cuMemGetInfo_v2(std::size_t *available, std::size_t *total) {
    TRY(check_context());
    *available = memory().available();
    *total = DEVICE_BYTES;
    return CUDA_SUCCESS;
}

API CUresult cuMemAlloc_v2(void **address, std::size_t bytes) {
    TRY(check_context());
    TRY(captures().check_unsafe_call());
    return memory().allocate(Memory::DEVICE, bytes, address);
}

API CUresult cuMemFree_v2(void *address) {
    TRY(check_context());
    TRY(captures().check_unsafe_call());
    synchronize(current_context);
    return memory().release(Memory::DEVICE, address);
}

// Refuses work that the emulator cannot capture.
static CUresult check_not_capturing(const void *stream_handle) {
    TRY(check_context());
    auto stream = find_stream(stream_handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    Capture *capture = stream->capturing();
    if (!capture) return CUDA_SUCCESS;
    capture->invalid = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
}

API CUresult cuMemAllocAsync(void **address, std::size_t bytes, void *stream) {
    TRY(check_not_capturing(stream));
    return memory().allocate(Memory::DEVICE, bytes, address);
}

API CUresult cuMemFreeAsync(void *address, void *stream) {
    TRY(check_not_capturing(stream));
    find_stream(stream)->occupations().wait();
    return memory().release(Memory::DEVICE, address);
}

API CUresult cuMemHostAlloc(void **address, std::size_t bytes, unsigned) {
    TRY(check_context());
    TRY(captures().check_unsafe_call());
    return memory().allocate(Memory::HOST, bytes, address);
}

API CUresult cuMemAllocHost_v2(void **address, std::size_t bytes) { return cuMemHostAlloc(address, bytes, 0); }

API CUresult cuMemFreeHost(void *address) {
    TRY(check_context());
    TRY(captures().check_unsafe_call());
    synchronize(current_context);
    return memory().release(Memory::HOST, address);
}

static CUresult copy(void *stream, void *to, const void *from, std::size_t bytes) {
    return enqueue(stream, "a copy of memory", [=] { std::memmove(to, from, bytes); });
}

static void *pointer(CUdeviceptr address) { return reinterpret_cast<void *>(address); }

// Checks that the device's side of a copy is memory of the device.
static CUresult check_range(CUdeviceptr address, std::size_t bytes) {
    TRY(check_context());
    return memory().contains(Memory::DEVICE, pointer(address), bytes) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// Copies for a while, concurrently with the work of other streams.
static CUresult copy_beside(Stream &stream, void *to, const void *from, std::size_t bytes) {
    std::promise<std::chrono::steady_clock::time_point> done;
    auto before = stream.occupy({done.get_future().share()});
    std::thread([=, done = std::move(done)]() mutable {
        for (auto &occupation : before) occupation.wait();
        std::this_thread::sleep_for(COPY_DELAY);
        std::memmove(to, from, bytes);
        done.set_value(std::chrono::steady_clock::now());
    }).detach();
    return CUDA_SUCCESS;
}

API CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, std::size_t bytes, void *stream) {
    TRY(check_range(to, bytes));
    return copy(stream, pointer(to), from, bytes);
}

API CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, std::size_t bytes, void *stream) {
    TRY(check_range(from, bytes));
    auto target = find_stream(stream);
    if (target && !target->capturing() && memory().contains(Memory::HOST, to, bytes))
        return copy_beside(*target, to, pointer(from), bytes);
    return copy(stream, to, pointer(from), bytes);
}

API CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, std::size_t bytes, void *stream) {
    TRY(check_range(to, bytes));
    TRY(check_range(from, bytes));
    return copy(stream, pointer(to), pointer(from), bytes);
}

API CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void *from, std::size_t bytes) {
    TRY(captures().check_unsafe_call());
    return cuMemcpyHtoDAsync_v2(to, from, bytes, nullptr);
}

API CUresult cuMemcpyDtoH_v2(void *to, CUdeviceptr from, std::size_t bytes) {
    TRY(captures().check_unsafe_call());
    return cuMemcpyDtoHAsync_v2(to, from, bytes, nullptr);
}

API CUresult cuMemcpyDtoD_v2(CUdeviceptr to, CUdeviceptr from, std::size_t bytes) {
    TRY(captures().check_unsafe_call());
    return cuMemcpyDtoDAsync_v2(to, from, bytes, nullptr);
}

template <class T>
static CUresult fill(CUdeviceptr to, T value, std::size_t count, void *stream) {
    if (to % sizeof(T) != 0 || count > SIZE_MAX / sizeof(T)) return CUDA_ERROR_INVALID_VALUE;
    TRY(check_range(to, count * sizeof(T)));
    return enqueue(stream, "a fill of memory", [=] { std::fill_n(static_cast<T *>(pointer(to)), count, value); });
}

API CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, std::size_t count, void *stream) {
    return fill(to, value, count, stream);
}

API CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, std::size_t count, void *stream) {
    return fill(to, value, count, stream);
}

API CUresult cuMemsetD8_v2(CUdeviceptr to, unsigned char value, std::size_t count) {
    TRY(captures().check_unsafe_call());
    return fill(to, value, count, nullptr);
}

API CUresult cuMemsetD32_v2(CUdeviceptr to, unsigned value, std::size_t count) {
    TRY(captures().check_unsafe_call());
    return fill(to, value, count, nullptr);
}

// ---- streams and events

API CUresult cuStreamCreate(Stream **stream, unsigned) {
    TRY(check_context());
    auto created = std::make_shared<Stream>();
    created->context = current_context;
    *stream = handles<Stream>().add(std::move(created));
    return CUDA_SUCCESS;
}

API CUresult cuStreamCreateWithPriority(Stream **stream, unsigned flags, int) { return cuStreamCreate(stream, flags); }

API CUresult cuStreamDestroy_v2(Stream *stream) { return handles<Stream>().remove(stream); }

API CUresult cuStreamSynchronize(Stream *stream) {
    TRY(check_not_capturing(stream));
    find_stream(stream)->occupations().wait();
    return CUDA_SUCCESS;
}

API CUresult cuStreamQuery(Stream *stream) {
    TRY(check_not_capturing(stream));
    return find_stream(stream)->occupations().ready() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

API CUresult cuEventCreate(Event **event, unsigned flags) {
    constexpr unsigned NOT_TIMED = 2;
    TRY(check_context());
    auto created = std::make_shared<Event>();
    created->timed = !(flags & NOT_TIMED);
    *event = handles<Event>().add(std::move(created));
    return CUDA_SUCCESS;
}

API CUresult cuEventDestroy_v2(Event *event) { return handles<Event>().remove(event); }

API CUresult cuEventRecord(Event *event_handle, Stream *stream_handle) {
    auto event = handles<Event>().find(event_handle);
    auto stream = find_stream(stream_handle);
    if (!event || !stream) return CUDA_ERROR_INVALID_HANDLE;
    event->capture = stream->capturing() ? stream->capture : nullptr;
    event->time = std::chrono::steady_clock::now();
    event->occupations = stream->occupations();
    event->recorded = true;
    return CUDA_SUCCESS;
}

API CUresult cuEventRecordWithFlags(Event *event, Stream *stream, unsigned) { return cuEventRecord(event, stream); }

// An event has always been reached, unless it is a point in a graph or comes after an occupation.
API CUresult cuEventQuery(Event *handle) {
    auto event = handles<Event>().find(handle);
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    if (event->captured()) return CUDA_ERROR_CAPTURED_EVENT;
    return event->occupations.ready() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

API CUresult cuEventSynchronize(Event *handle) {
    auto event = handles<Event>().find(handle);
    if (!event) return CUDA_ERROR_INVALID_HANDLE;
    if (event->captured()) return CUDA_ERROR_CAPTURED_EVENT;
    event->occupations.wait();
    return CUDA_SUCCESS;
}

API CUresult cuEventElapsedTime_v2(float *milliseconds, Event *start_handle, Event *end_handle) {
    auto start = handles<Event>().find(start_handle), end = handles<Event>().find(end_handle);
    if (!start || !end || !start->recorded || !end->recorded || !start->timed || !end->timed)
        return CUDA_ERROR_INVALID_HANDLE;
    if (!start->occupations.ready() || !end->occupations.ready()) return CUDA_ERROR_NOT_READY;
    auto from = start->occupations.end(start->time), to = end->occupations.end(end->time);
    *milliseconds = std::chrono::duration<float, std::milli>(to - from).count();
    return CUDA_SUCCESS;
}

API CUresult cuEventElapsedTime(float *milliseconds, Event *start, Event *end) {
    return cuEventElapsedTime_v2(milliseconds, start, end);
}

// A stream that waits for an event of a capture takes part in the capture from then on.
API CUresult cuStreamWaitEvent(Stream *stream_handle, Event *event_handle, unsigned) {
    auto stream = find_stream(stream_handle);
    auto event = handles<Event>().find(event_handle);
    if (!stream || !event) return CUDA_ERROR_INVALID_HANDLE;
    if (!event->captured()) {
        stream->occupy(event->occupations.all());
        return CUDA_SUCCESS;
    }
    if (stream->capturing() && stream->capture != event->capture) return CUDA_ERROR_STREAM_CAPTURE_MERGE;
    stream->capture = event->capture;
    return CUDA_SUCCESS;
}

// ---- graphs

API CUresult cuStreamBeginCapture_v2(Stream *handle, unsigned mode) {
    auto stream = handles<Stream>().find(handle);
    if (!stream || mode > CAPTURE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
    if (stream->capturing()) return CUDA_ERROR_ILLEGAL_STATE;
    stream->capture = std::make_shared<Capture>();
    stream->capture->origin = stream.get();
    stream->capture->mode = CaptureMode(mode);
    stream->capture->thread = std::this_thread::get_id();
    captures().add(stream->capture);
    return CUDA_SUCCESS;
}

API CUresult cuStreamEndCapture(Stream *handle, Graph **graph) {
    *graph = nullptr;
    auto stream = handles<Stream>().find(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    auto capture = stream->capture;
    if (!stream->capturing()) return CUDA_ERROR_ILLEGAL_STATE;
    if (capture->origin != stream.get()) return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
    if (capture->mode != CAPTURE_RELAXED && capture->thread != std::this_thread::get_id())
        return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    capture->ended = true;
    captures().remove(capture.get());
    stream->capture = nullptr;
    if (capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    *graph = handles<Graph>().add(std::make_shared<Graph>(std::move(capture->operations)));
    return CUDA_SUCCESS;
}

API CUresult cuStreamIsCapturing(Stream *handle, unsigned *status) {
    enum { NONE = 0, ACTIVE = 1, INVALIDATED = 2 };
    auto stream = find_stream(handle);
    if (!stream) return CUDA_ERROR_INVALID_HANDLE;
    Capture *capture = stream->capturing();
    *status = !capture ? NONE : capture->invalid ? INVALIDATED : ACTIVE;
    return CUDA_SUCCESS;
}

API CUresult cuGraphInstantiateWithFlags(GraphExec **exec, Graph *handle, unsigned long long) {
    auto graph = handles<Graph>().find(handle);
    if (!graph) return CUDA_ERROR_INVALID_VALUE;
    *exec = handles<GraphExec>().add(std::make_shared<GraphExec>(GraphExec{*graph}));
    return CUDA_SUCCESS;
}

API CUresult cuGraphInstantiate_v2(GraphExec **exec, Graph *graph, void **, char *, std::size_t) {
    return cuGraphInstantiateWithFlags(exec, graph, 0);
}

API CUresult cuGraphUpload(GraphExec *exec, Stream *) {
    return handles<GraphExec>().find(exec) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

API CUresult cuGraphLaunch(GraphExec *handle, Stream *stream) {
    TRY(check_context());
    auto exec = handles<GraphExec>().find(handle);
    if (!exec) return CUDA_ERROR_INVALID_VALUE;
    for (const Operation &operation : exec->operations) TRY(enqueue(stream, operation.name, operation.run));
    return CUDA_SUCCESS;
}

API CUresult cuGraphExecDestroy(GraphExec *exec) { return handles<GraphExec>().remove(exec); }

API CUresult cuGraphDestroy(Graph *graph) { return handles<Graph>().remove(graph); }

// ---- modules and launches

API CUresult cuModuleLoadData(Module **module, const void *bytes) {
    TRY(check_context());
    TRY(captures().check_unsafe_call());
    Image image(bytes);
    if (!image.valid()) return CUDA_ERROR_INVALID_IMAGE;
    auto loaded = std::make_shared<Module>();
    loaded->library = load_library(image);
    if (!loaded->library) return CUDA_ERROR_INVALID_IMAGE;
    loaded->static_shared = find_static_shared(loaded->library);
    loaded->shared_sizes = image.shared_sizes();
    *module = handles<Module>().add(std::move(loaded));
    return CUDA_SUCCESS;
}

API CUresult cuModuleLoadDataEx(Module **module, const void *bytes, unsigned, int *, void **) {
    return cuModuleLoadData(module, bytes);
}

API CUresult cuModuleUnload(Module *handle) {
    auto module = handles<Module>().find(handle);
    if (!module) return CUDA_ERROR_INVALID_HANDLE;
    std::lock_guard lock(module->mutex);
    for (const auto &[name, function] : module->functions) handles<Function>().remove(function);
    module->functions.clear();
    return handles<Module>().remove(handle);
}

API CUresult cuModuleGetFunction(Function **function, Module *handle, const char *name) {
    TRY(check_context());
    auto module = handles<Module>().find(handle);
    if (!module) return CUDA_ERROR_INVALID_HANDLE;
    void *symbol = dlsym(module->library, (std::string("ulmus_kernel_") + name).c_str());
    if (!symbol) return CUDA_ERROR_NOT_FOUND;
    std::lock_guard lock(module->mutex);
    Function *&known = module->functions[name];
    if (!known) {
        auto kernel = static_cast<const ulmus::Kernel *>(symbol);
        known = handles<Function>().add(std::make_shared<Function>(module, name, kernel));
    }
    *function = known;
    return CUDA_SUCCESS;
}

enum FunctionAttribute {
    MAX_THREADS = 0,
    STATIC_SHARED = 1,
    REGISTERS = 4,
    BINARY_VERSION = 6,
    MAX_DYNAMIC_SHARED = 8,
};

API CUresult cuFuncSetAttribute(Function *handle, int attribute, int value) {
    auto function = handles<Function>().find(handle);
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    if (attribute != MAX_DYNAMIC_SHARED) return CUDA_SUCCESS;
    if (value < 0 || value > int(ulmus::MAX_SHARED) - function->static_shared) return CUDA_ERROR_INVALID_VALUE;
    function->max_dynamic_shared = value;
    return CUDA_SUCCESS;
}

API CUresult cuFuncGetAttribute(int *value, int attribute, Function *handle) {
    auto function = handles<Function>().find(handle);
    if (!function) return CUDA_ERROR_INVALID_HANDLE;
    unsigned bound = function->kernel->max_threads;
    switch (attribute) {
    case MAX_THREADS: *value = bound != 0 ? bound : ulmus::MAX_BLOCK; break;
    case STATIC_SHARED: *value = function->static_shared; break;
    case REGISTERS: *value = 32; break;
    case BINARY_VERSION: *value = 90; break;
    case MAX_DYNAMIC_SHARED: *value = function->allowed_shared(); break;
    default: *value = 0;
    }
    return CUDA_SUCCESS;
}

API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, Function *function, int, std::size_t) {
    if (!handles<Function>().find(function)) return CUDA_ERROR_INVALID_HANDLE;
    *blocks = 2;
    return CUDA_SUCCESS;
}

API CUresult cuLaunchKernel(Function *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                            unsigned block_y, unsigned block_z, unsigned dynamic_shared, void *stream,
                            void **parameters, void **extra) {
    if (extra) return CUDA_ERROR_NOT_SUPPORTED;
    return launch(function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, dynamic_shared, stream, parameters);
}

struct LaunchConfig {
    ulmus::Index grid, block;
    unsigned dynamic_shared;
    void *stream;
    void *attributes;
    unsigned attribute_count;
};

API CUresult cuLaunchKernelEx(const LaunchConfig *config, Function *function, void **parameters, void **extra) {
    if (!config) return CUDA_ERROR_INVALID_VALUE;
    if (extra) return CUDA_ERROR_NOT_SUPPORTED;
    return launch(function, config->grid, config->block, config->dynamic_shared, config->stream, parameters);
}
