// libnccl for machines without a GPU: the collective operations that our CUDA backend calls, between threads and
// processes of one host.
//
// Every communicator has a thread that executes its operations one after the other, while they occupy their streams.
// Members are connected by abstract sockets. As on hardware, an operation with a member that has died or left hangs
// silently until it is aborted, and a call on a nonblocking communicator returns before the operation is on its stream.
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <queue>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <dlfcn.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "enqueue.h"

#define API extern "C" __attribute__((visibility("default")))

enum ncclResult_t : unsigned {
    ncclSuccess = 0,
    ncclUnhandledCudaError = 1,
    ncclSystemError = 2,
    ncclInternalError = 3,
    ncclInvalidArgument = 4,
    ncclInvalidUsage = 5,
    ncclRemoteError = 6,
    ncclInProgress = 7,
};

enum ncclDataType_t : int { ncclUint8 = 1, ncclInt64 = 4, ncclFloat32 = 7, ncclBfloat16 = 9 };
enum ncclRedOp_t : int { ncclSum = 0 };

struct ncclUniqueId {
    char internal[128];
};

// The fields that all versions have.
struct ncclConfig_t {
    std::size_t size;
    unsigned magic, version;
    int blocking;
};

// Returns early with a result that is not a success.
#define TRY(expression)                                                                                                \
    if (ncclResult_t result_ = (expression)) return result_

namespace {

using Clock = std::chrono::steady_clock;

constexpr int VERSION = 23003;
constexpr unsigned CONFIG_MAGIC = 0xcafebeef;
constexpr int UNDEFINED = INT32_MIN;
// Number of bytes that are summed at a time.
constexpr std::size_t PIECE = 1 << 16;

// ---- the last error

std::mutex last_mutex;
char last_error[1024];

ncclResult_t refuse(ncclResult_t result, const std::string &why) {
    std::lock_guard lock(last_mutex);
    std::snprintf(last_error, sizeof last_error, "%s", why.c_str());
    return result;
}

// ---- the emulated driver

struct Driver {
    ulmus::Occupy occupy = nullptr;
    unsigned (*device)(int *device) = nullptr;

    static const Driver &get() {
        static const Driver driver;
        return driver;
    }

    Driver() {
        void *library = dlopen("libcuda.so", RTLD_NOW | RTLD_NOLOAD);
        if (!library) return;
        occupy = reinterpret_cast<ulmus::Occupy>(dlsym(library, "ulmus_emulator_occupy"));
        device = reinterpret_cast<unsigned (*)(int *)>(dlsym(library, "cuCtxGetDevice"));
    }
};

ncclResult_t current_device(int *device) {
    const Driver &driver = Driver::get();
    if (!driver.occupy || !driver.device) return refuse(ncclUnhandledCudaError, "libcuda is not the emulator's");
    if (driver.device(device) != 0) return refuse(ncclUnhandledCudaError, "the thread has no current context");
    return ncclSuccess;
}

// ---- sockets

// Thrown when an operation is aborted.
struct Aborted {};

// Waits that end when the alarm is raised.
class Alarm {
  public:
    Alarm() : file_(eventfd(0, EFD_CLOEXEC)) {}
    ~Alarm() { close(file_); }
    Alarm(const Alarm &) = delete;

    void raise() {
        rung_ = true;
        std::uint64_t one = 1;
        [[maybe_unused]] ssize_t written = write(file_, &one, sizeof one);
    }

    bool rung() const { return rung_; }

    // Waits until the socket, if there is one, is ready.
    void wait(int socket, short events) {
        pollfd files[2] = {{file_, POLLIN, 0}, {socket, events, 0}};
        while (poll(files, socket < 0 ? 1 : 2, -1) < 0) {}
        if (rung_) throw Aborted();
    }

    void sleep(std::chrono::milliseconds time) {
        pollfd file = {file_, POLLIN, 0};
        poll(&file, 1, int(time.count()));
        if (rung_) throw Aborted();
    }

    // Waits for the alarm, because nothing else will happen.
    [[noreturn]] void hang() {
        for (;;) wait(-1, 0);
    }

  private:
    int file_;
    std::atomic<bool> rung_{false};
};

sockaddr_un address_of(const std::string &name, socklen_t *length) {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    // A leading zero byte makes the socket abstract, so that there is no file.
    std::copy(name.begin(), name.end(), address.sun_path + 1);
    *length = offsetof(sockaddr_un, sun_path) + 1 + name.size();
    return address;
}

class Socket {
  public:
    Socket() = default;
    explicit Socket(int file) : file_(file) {}
    Socket(Socket &&other) noexcept : file_(std::exchange(other.file_, -1)) {}
    Socket &operator=(Socket &&other) noexcept {
        std::swap(file_, other.file_);
        return *this;
    }
    ~Socket() {
        if (file_ >= 0) close(file_);
    }

    static Socket open() { return Socket(socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)); }

    bool listen(const std::string &name) {
        socklen_t length;
        sockaddr_un address = address_of(name, &length);
        return bind(file_, reinterpret_cast<sockaddr *>(&address), length) == 0 && ::listen(file_, 1024) == 0;
    }

    bool valid() const { return file_ >= 0; }
    int file() const { return file_; }

    Socket accept(Alarm &alarm) {
        for (;;) {
            int file = accept4(file_, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
            if (file >= 0) return Socket(file);
            alarm.wait(file_, POLLIN);
        }
    }

    void connect(const std::string &name, Alarm &alarm) {
        socklen_t length;
        sockaddr_un address = address_of(name, &length);
        while (::connect(file_, reinterpret_cast<sockaddr *>(&address), length) != 0) {
            // The peer is gone.
            if (errno != EAGAIN && errno != EINTR) alarm.hang();
            alarm.sleep(std::chrono::milliseconds(1));
        }
    }

    void write(const void *data, std::size_t bytes, Alarm &alarm) {
        for (auto from = static_cast<const char *>(data); bytes > 0;) {
            ssize_t done = alarm.rung() ? throw Aborted() : send(file_, from, bytes, MSG_NOSIGNAL);
            if (done < 0) {
                if (errno != EAGAIN && errno != EINTR) alarm.hang();
                alarm.wait(file_, POLLOUT);
                continue;
            }
            from += done;
            bytes -= done;
        }
    }

    void read(void *data, std::size_t bytes, Alarm &alarm) {
        for (auto to = static_cast<char *>(data); bytes > 0;) {
            ssize_t done = alarm.rung() ? throw Aborted() : recv(file_, to, bytes, 0);
            if (done == 0 || (done < 0 && errno != EAGAIN && errno != EINTR)) alarm.hang();
            if (done < 0) {
                alarm.wait(file_, POLLIN);
                continue;
            }
            to += done;
            bytes -= done;
        }
    }

  private:
    int file_ = -1;
};

std::string random_name() {
    std::random_device random;
    char name[32];
    std::snprintf(name, sizeof name, "ulmus-nccl-%08x%08x", random(), random());
    return name;
}

// ---- how members find one another

// What a member tells the others about itself.
struct Presence {
    int rank, size, device, may_share;
    char name[32];
};

// Collects the members' presences, and sends them to all members when all have arrived. There is one group per id.
void meet(Socket listener) {
    Alarm alarm; // never raised
    std::map<int, std::pair<Presence, Socket>> members;
    for (;;) {
        Socket member = listener.accept(alarm);
        Presence presence;
        // A living member sends this at once.
        pollfd file = {member.file(), POLLIN, 0};
        poll(&file, 1, 1000);
        if (recv(member.file(), &presence, sizeof presence, MSG_WAITALL) != sizeof presence) continue;
        members.insert_or_assign(presence.rank, std::pair(presence, std::move(member)));
        if (int(members.size()) < presence.size) continue;
        std::vector<Presence> table;
        for (auto &[rank, one] : members) table.push_back(one.first);
        for (auto &[rank, one] : members)
            send(one.second.file(), table.data(), table.size() * sizeof(Presence), MSG_NOSIGNAL);
        return;
    }
}

// ---- numbers

std::size_t width(ncclDataType_t type) {
    switch (type) {
    case ncclUint8: return 1;
    case ncclBfloat16: return 2;
    case ncclFloat32: return 4;
    case ncclInt64: return 8;
    }
    return 0;
}

float from_bfloat16(std::uint16_t x) {
    std::uint32_t bits = std::uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

std::uint16_t to_bfloat16(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return 0x7FFF;
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

template <class T, class Add>
void add_each(void *sums, const void *terms, std::size_t bytes, Add add) {
    auto to = static_cast<T *>(sums);
    auto from = static_cast<const T *>(terms);
    for (std::size_t i = 0; i < bytes / sizeof(T); i++) to[i] = add(to[i], from[i]);
}

void add(ncclDataType_t type, void *sums, const void *terms, std::size_t bytes) {
    auto plain = [](auto a, auto b) { return decltype(a)(a + b); };
    switch (type) {
    case ncclUint8: return add_each<std::uint8_t>(sums, terms, bytes, plain);
    case ncclInt64: return add_each<std::uint64_t>(sums, terms, bytes, plain);
    case ncclFloat32: return add_each<float>(sums, terms, bytes, plain);
    case ncclBfloat16:
        return add_each<std::uint16_t>(sums, terms, bytes, [](std::uint16_t a, std::uint16_t b) {
            return to_bfloat16(from_bfloat16(a) + from_bfloat16(b));
        });
    }
}

// ---- communicators

// A step of an operation.
struct Step {
    enum Kind : std::uint64_t { REDUCE, BROADCAST } kind;
    int root;
    const char *from;
    char *to;
    std::size_t count;
    ncclDataType_t type;

    std::size_t bytes() const { return count * width(type); }
};

// Precedes data, so that members notice if they are in different operations.
struct Heading {
    std::uint64_t number, kind, root, count, type;

    bool operator!=(const Heading &other) const { return std::memcmp(this, &other, sizeof *this) != 0; }
};

// An error of the members of a group.
struct Misuse {
    std::string why;
};

class Communicator : public std::enable_shared_from_this<Communicator> {
  public:
    Communicator(ncclUniqueId id, int rank, int size, int device, bool blocking)
        : rank_(rank), size_(size), device_(device), blocking_(blocking), id_(id.internal), peers_(size) {}

    void start() { thread_ = std::thread(&Communicator::work, this); }

    bool blocking() const { return blocking_; }
    int rank() const { return rank_; }
    int size() const { return size_; }
    int device() const { return device_; }

    ncclResult_t state() {
        std::lock_guard lock(mutex_);
        return state_;
    }

    ncclResult_t wait_until_idle() {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return state_ != ncclInProgress; });
        return state_;
    }

    // Returns an error if no new operation may be started.
    ncclResult_t check_idle() {
        std::lock_guard lock(mutex_);
        if (finalized_) return refuse(ncclInvalidArgument, "the communicator was finalized");
        if (state_ == ncclInProgress)
            return refuse(ncclInvalidArgument, "used before the previous call has succeeded");
        return state_;
    }

    // Puts an operation on a stream: now if the communicator is blocking, or else somewhat later.
    ncclResult_t submit(void *stream, std::vector<Step> steps) {
        if (blocking_) return launch(stream, std::move(steps));
        set_state(ncclInProgress);
        auto later = [self = shared_from_this(), stream, steps = std::move(steps)]() mutable {
            std::this_thread::sleep_for(std::chrono::microseconds(100));
            self->set_state(self->launch(stream, std::move(steps)));
        };
        std::thread(std::move(later)).detach();
        return ncclInProgress;
    }

    ncclResult_t finalize() {
        {
            std::lock_guard lock(mutex_);
            finalized_ = true;
            state_ = ncclInProgress;
            jobs_.push({nullptr, {}, [this] { set_state(ncclSuccess); }});
        }
        changed_.notify_all();
        return blocking_ ? wait_until_idle() : ncclInProgress;
    }

    void destroy() {
        {
            std::lock_guard lock(mutex_);
            ending_ = true;
        }
        changed_.notify_all();
        thread_.join();
    }

    void abort() {
        alarm_.raise();
        destroy();
        peers_.clear();
    }

  private:
    struct Job {
        std::shared_ptr<std::promise<Clock::time_point>> done;
        std::vector<ulmus::Occupation> before;
        std::function<void()> run;
    };

    void set_state(ncclResult_t state) {
        {
            std::lock_guard lock(mutex_);
            // An error is permanent.
            if (state_ == ncclSuccess || state_ == ncclInProgress) state_ = state;
        }
        changed_.notify_all();
    }

    ncclResult_t launch(void *stream, std::vector<Step> steps) {
        Job job = {std::make_shared<std::promise<Clock::time_point>>(), {}, nullptr};
        job.run = [this, steps = std::move(steps)] {
            for (const Step &step : steps) carry_out(step);
        };
        {
            std::lock_guard lock(mutex_);
            if (ending_) return ncclInvalidUsage;
            if (Driver::get().occupy(stream, job.done->get_future().share(), &job.before) != 0)
                return refuse(ncclUnhandledCudaError, "the stream cannot be used");
            jobs_.push(std::move(job));
        }
        changed_.notify_all();
        return ncclSuccess;
    }

    void work() {
        attempt([this] {
            join();
            set_state(ncclSuccess);
        });
        for (;;) {
            Job job;
            {
                std::unique_lock lock(mutex_);
                changed_.wait(lock, [&] { return ending_ || !jobs_.empty(); });
                if (jobs_.empty()) return;
                job = std::move(jobs_.front());
                jobs_.pop();
            }
            attempt([&] {
                for (auto &before : job.before)
                    while (before.wait_for(std::chrono::milliseconds(1)) != std::future_status::ready)
                        if (alarm_.rung()) throw Aborted();
                if (alarm_.rung()) throw Aborted();
                job.run();
            });
            if (job.done) job.done->set_value(Clock::now());
        }
    }

    // Runs some work. If it cannot be completed, waits until it is aborted.
    template <class Work>
    void attempt(Work work) {
        try {
            try {
                work();
            } catch (const Misuse &misuse) {
                set_state(refuse(ncclInvalidUsage, misuse.why));
                alarm_.hang();
            }
        } catch (Aborted) {
        }
    }

    // Finds the other members and connects to them.
    void join() {
        std::string name = random_name();
        Socket listener = Socket::open();
        if (!listener.listen(name)) throw Misuse{"cannot listen on a socket"};
        const char *share = std::getenv("NCCL_MULTI_RANK_GPU_ENABLE");
        Presence own = {rank_, size_, device_, share && std::atoi(share) != 0, {}};
        std::copy(name.begin(), name.end(), own.name);
        Socket meeting = Socket::open();
        meeting.connect(id_, alarm_);
        meeting.write(&own, sizeof own, alarm_);
        std::vector<Presence> table(size_);
        meeting.read(table.data(), table.size() * sizeof(Presence), alarm_);
        for (auto &one : table)
            if (one.rank != rank_ && one.device == device_ && !(own.may_share && one.may_share))
                throw Misuse{"Duplicate GPU detected : rank " + std::to_string(rank_) + " and rank " +
                             std::to_string(one.rank) + " both on device " + std::to_string(device_) +
                             "; NCCL_MULTI_RANK_GPU_ENABLE=1 allows it"};
        for (int peer = 0; peer < rank_; peer++) {
            peers_[peer] = Socket::open();
            peers_[peer].connect(table[peer].name, alarm_);
            peers_[peer].write(&rank_, sizeof rank_, alarm_);
        }
        for (int peer = rank_ + 1; peer < size_; peer++) {
            Socket connection = listener.accept(alarm_);
            int who;
            connection.read(&who, sizeof who, alarm_);
            if (who <= rank_ || who >= size_ || peers_[who].valid()) throw Misuse{"two members have the same rank"};
            peers_[who] = std::move(connection);
        }
    }

    void carry_out(const Step &step) {
        Heading heading = {number_++, step.kind, std::uint64_t(step.root), step.count, std::uint64_t(step.type)};
        bool is_root = step.root == rank_, is_broadcast = step.kind == Step::BROADCAST;
        for (int peer = 0; peer < size_; peer++) {
            if (peer == rank_ || (!is_root && peer != step.root)) continue;
            if (is_root == is_broadcast) {
                peers_[peer].write(&heading, sizeof heading, alarm_);
                peers_[peer].write(step.from, step.bytes(), alarm_);
                continue;
            }
            Heading theirs;
            peers_[peer].read(&theirs, sizeof theirs, alarm_);
            if (theirs != heading)
                throw Misuse{"rank " + std::to_string(peer) + " is in another operation than rank " +
                             std::to_string(rank_)};
        }
        if (is_broadcast) {
            if (!is_root) peers_[step.root].read(step.to, step.bytes(), alarm_);
            else if (step.to != step.from) std::memmove(step.to, step.from, step.bytes());
        } else if (is_root) {
            sum(step);
        }
    }

    // Sums the data of all members in the order of their ranks.
    void sum(const Step &step) {
        std::vector<char> sums(PIECE), terms(PIECE);
        for (std::size_t at = 0; at < step.bytes(); at += PIECE) {
            std::size_t bytes = std::min(PIECE, step.bytes() - at);
            for (int member = 0; member < size_; member++) {
                auto &into = member == 0 ? sums : terms;
                if (member == rank_) std::memcpy(into.data(), step.from + at, bytes);
                else peers_[member].read(into.data(), bytes, alarm_);
                if (member != 0) add(step.type, sums.data(), terms.data(), bytes);
            }
            std::memcpy(step.to + at, sums.data(), bytes);
        }
    }

    const int rank_, size_, device_;
    const bool blocking_;
    const std::string id_;
    std::vector<Socket> peers_;
    Alarm alarm_;
    std::uint64_t number_ = 0;
    std::thread thread_;

    std::mutex mutex_;
    std::condition_variable changed_;
    ncclResult_t state_ = ncclInProgress;
    bool finalized_ = false, ending_ = false;
    std::queue<Job> jobs_;
};

using Shared = std::shared_ptr<Communicator>;

std::mutex communicators_mutex;
std::map<void *, Shared> &communicators = *new std::map<void *, Shared>;

ncclResult_t find(void *handle, Shared &found, bool remove = false) {
    std::lock_guard lock(communicators_mutex);
    auto entry = communicators.find(handle);
    if (entry == communicators.end()) return refuse(ncclInvalidArgument, "no such communicator");
    found = entry->second;
    if (remove) communicators.erase(entry);
    return ncclSuccess;
}

// ---- groups

// An operation that a thread has called since its group began.
struct Operation {
    Shared communicator;
    void *stream;
    std::vector<Step> steps;
};

struct Group {
    int depth = 0;
    std::vector<Operation> operations;
    std::vector<Shared> beginning;
};

thread_local Group group;

ncclResult_t end_group() {
    if (group.depth == 0) return refuse(ncclInvalidUsage, "no group has begun");
    if (--group.depth > 0) return ncclSuccess;
    auto operations = std::exchange(group.operations, {});
    auto beginning = std::exchange(group.beginning, {});
    ncclResult_t result = ncclSuccess;
    auto note = [&](ncclResult_t other) {
        if (result == ncclSuccess || result == ncclInProgress) result = other == ncclSuccess ? result : other;
    };
    for (auto &communicator : beginning)
        note(communicator->blocking() ? communicator->wait_until_idle() : ncclInProgress);
    for (auto &[communicator, stream, steps] : operations) note(communicator->submit(stream, std::move(steps)));
    return result;
}

// Adds an operation to the thread's current group, or executes it as a group of its own.
ncclResult_t call(void *handle, void *stream, ncclDataType_t type, int op, const std::vector<Step> &steps) {
    Shared communicator;
    TRY(find(handle, communicator));
    int device;
    TRY(current_device(&device));
    if (device != communicator->device()) return refuse(ncclInvalidUsage, "the current device is another one");
    if (width(type) == 0) return refuse(ncclInvalidArgument, "the emulator has no such data type");
    if (op != ncclSum) return refuse(ncclInvalidArgument, "the emulator only supports sums");
    TRY(communicator->check_idle());
    for (const Step &step : steps) {
        if (step.root < 0 || step.root >= communicator->size()) return refuse(ncclInvalidArgument, "no such root");
        bool writes = step.kind == Step::BROADCAST || step.root == communicator->rank();
        bool reads = step.kind == Step::REDUCE || step.root == communicator->rank();
        if (step.count > 0 && ((writes && !step.to) || (reads && !step.from)))
            return refuse(ncclInvalidArgument, "a buffer is null");
    }
    group.depth++;
    auto same = [&](auto &other) { return other.communicator == communicator && other.stream == stream; };
    auto known = std::find_if(group.operations.begin(), group.operations.end(), same);
    if (known == group.operations.end()) known = group.operations.insert(known, {communicator, stream, {}});
    known->steps.insert(known->steps.end(), steps.begin(), steps.end());
    return end_group();
}

} // namespace

// ---- the library

API ncclResult_t ncclGetVersion(int *version) {
    if (!version) return ncclInvalidArgument;
    *version = VERSION;
    return ncclSuccess;
}

API const char *ncclGetErrorString(ncclResult_t result) {
    switch (result) {
    case ncclSuccess: return "no error";
    case ncclUnhandledCudaError: return "unhandled cuda error";
    case ncclSystemError: return "unhandled system error";
    case ncclInternalError: return "internal error";
    case ncclInvalidArgument: return "invalid argument";
    case ncclInvalidUsage: return "invalid usage";
    case ncclRemoteError: return "remote process exited or there was a network error";
    case ncclInProgress: return "operation in progress";
    }
    return "unknown result code";
}

API const char *ncclGetLastError(void *) { return last_error; }

API ncclResult_t ncclGetUniqueId(ncclUniqueId *id) {
    if (!id) return ncclInvalidArgument;
    std::string name = random_name();
    Socket listener = Socket::open();
    if (!listener.listen(name)) return refuse(ncclSystemError, "cannot listen on a socket");
    *id = {};
    std::copy(name.begin(), name.end(), id->internal);
    std::thread(meet, std::move(listener)).detach();
    return ncclSuccess;
}

API ncclResult_t ncclCommInitRankConfig(void **handle, int size, ncclUniqueId id, int rank,
                                        const ncclConfig_t *config) {
    if (!handle || size < 1 || rank < 0 || rank >= size) return refuse(ncclInvalidArgument, "no such rank");
    if (config && config->magic != CONFIG_MAGIC) return refuse(ncclInvalidArgument, "the configuration is not valid");
    int device;
    TRY(current_device(&device));
    id.internal[sizeof id.internal - 1] = 0;
    bool blocking = !config || config->blocking == UNDEFINED || config->blocking != 0;
    auto communicator = std::make_shared<Communicator>(id, rank, size, device, blocking);
    communicator->start();
    *handle = communicator.get();
    {
        std::lock_guard lock(communicators_mutex);
        communicators[*handle] = communicator;
    }
    group.depth++;
    group.beginning.push_back(communicator);
    return end_group();
}

API ncclResult_t ncclCommInitRank(void **handle, int size, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(handle, size, id, rank, nullptr);
}

API ncclResult_t ncclCommGetAsyncError(void *handle, ncclResult_t *error) {
    Shared communicator;
    TRY(find(handle, communicator));
    *error = communicator->state();
    return ncclSuccess;
}

API ncclResult_t ncclCommCount(void *handle, int *count) {
    Shared communicator;
    TRY(find(handle, communicator));
    *count = communicator->size();
    return ncclSuccess;
}

API ncclResult_t ncclCommUserRank(void *handle, int *rank) {
    Shared communicator;
    TRY(find(handle, communicator));
    *rank = communicator->rank();
    return ncclSuccess;
}

API ncclResult_t ncclCommCuDevice(void *handle, int *device) {
    Shared communicator;
    TRY(find(handle, communicator));
    *device = communicator->device();
    return ncclSuccess;
}

API ncclResult_t ncclCommFinalize(void *handle) {
    Shared communicator;
    TRY(find(handle, communicator));
    TRY(communicator->check_idle());
    return communicator->finalize();
}

// Waits for operations in progress, however long that takes.
API ncclResult_t ncclCommDestroy(void *handle) {
    if (!handle) return ncclSuccess;
    Shared communicator;
    TRY(find(handle, communicator, true));
    communicator->wait_until_idle();
    communicator->destroy();
    return ncclSuccess;
}

API ncclResult_t ncclCommAbort(void *handle) {
    if (!handle) return ncclSuccess;
    Shared communicator;
    TRY(find(handle, communicator, true));
    communicator->abort();
    return ncclSuccess;
}

API ncclResult_t ncclGroupStart() {
    group.depth++;
    return ncclSuccess;
}

API ncclResult_t ncclGroupEnd() { return end_group(); }

// ---- operations

API ncclResult_t ncclReduce(const void *from, void *to, std::size_t count, ncclDataType_t type, int op, int root,
                            void *handle, void *stream) {
    auto in = static_cast<const char *>(from);
    return call(handle, stream, type, op, {{Step::REDUCE, root, in, static_cast<char *>(to), count, type}});
}

API ncclResult_t ncclBroadcast(const void *from, void *to, std::size_t count, ncclDataType_t type, int root,
                               void *handle, void *stream) {
    auto in = static_cast<const char *>(from);
    return call(handle, stream, type, ncclSum, {{Step::BROADCAST, root, in, static_cast<char *>(to), count, type}});
}

// One member computes the sum, so that all get the same bits.
API ncclResult_t ncclAllReduce(const void *from, void *to, std::size_t count, ncclDataType_t type, int op, void *handle,
                               void *stream) {
    auto in = static_cast<const char *>(from);
    auto out = static_cast<char *>(to);
    return call(handle, stream, type, op,
                {{Step::REDUCE, 0, in, out, count, type}, {Step::BROADCAST, 0, out, out, count, type}});
}

API ncclResult_t ncclAllGather(const void *from, void *to, std::size_t count, ncclDataType_t type, void *handle,
                               void *stream) {
    Shared communicator;
    TRY(find(handle, communicator));
    std::vector<Step> steps;
    for (int root = 0; root < communicator->size(); root++) {
        char *out = static_cast<char *>(to) + root * count * width(type);
        steps.push_back({Step::BROADCAST, root, static_cast<const char *>(from), out, count, type});
    }
    return call(handle, stream, type, ncclSum, steps);
}

API ncclResult_t ncclReduceScatter(const void *from, void *to, std::size_t count, ncclDataType_t type, int op,
                                   void *handle, void *stream) {
    Shared communicator;
    TRY(find(handle, communicator));
    std::vector<Step> steps;
    for (int root = 0; root < communicator->size(); root++) {
        const char *in = static_cast<const char *>(from) + root * count * width(type);
        steps.push_back({Step::REDUCE, root, in, static_cast<char *>(to), count, type});
    }
    return call(handle, stream, type, op, steps);
}
