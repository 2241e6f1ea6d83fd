// Runs the blocks of a launch on CPU threads, and the threads of a block as fibers of one CPU thread.
//
// A fiber runs until it waits or returns. The last lane to arrive at a warp's collective operation executes it for all
// lanes, and a block's barrier opens when no fiber of the block can run. The order in which warps and lanes run is
// pseudo-random, so that a missing barrier leads to wrong results.
#include "scheduler.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include <sys/mman.h>

// `ulmus_switch` saves the callee-saved registers and the stack pointer, and continues on another stack. It gets there with
// a jump, because the processor expects a `ret` to return to the last caller.
// The saved registers of a new fiber are r12: its function, r13: the function's argument, r15: its `Thread`.
asm(R"(
    .text
    .hidden ulmus_switch
    .globl ulmus_switch
    .type ulmus_switch, @function
ulmus_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmpq *%rcx

    .hidden ulmus_fiber_entry
    .globl ulmus_fiber_entry
    .type ulmus_fiber_entry, @function
ulmus_fiber_entry:
    movq %r13, %rdi
    callq *%r12
    movq %r15, %rdi
    callq ulmus_fiber_finished
    ud2
)");

extern "C" void ulmus_switch(void **save, void *stack_pointer);
extern "C" void ulmus_fiber_entry();

namespace ulmus {

void (*describe_address)(const void *address, char *text, std::size_t size) = nullptr;

namespace {

constexpr std::size_t PAGE = 4096;

std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

[[noreturn]] void out_of_memory() {
    std::fputs("emulator: no memory for stacks and shared memory\n", stderr);
    std::abort();
}

// Memory between two guard pages.
char *map_guarded(std::size_t bytes) {
    void *area = mmap(nullptr, bytes + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (area == MAP_FAILED) out_of_memory();
    char *memory = static_cast<char *>(area) + PAGE;
    if (mprotect(memory, bytes, PROT_READ | PROT_WRITE) != 0) out_of_memory();
    return memory;
}

// splitmix64
class Random {
  public:
    explicit Random(std::uint64_t seed) : state_(seed) {}

    std::uint32_t below(std::uint32_t limit) { return static_cast<std::uint32_t>((next() >> 32) * limit >> 32); }

  private:
    std::uint64_t next() {
        std::uint64_t x = state_ += 0x9E3779B97F4A7C15u;
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9u;
        x = (x ^ x >> 27) * 0x94D049BB133111EBu;
        return x ^ x >> 31;
    }

    std::uint64_t state_;
};

std::uint64_t seed() {
    static const std::uint64_t value = [] {
        const char *text = std::getenv("ULMUS_EMULATOR_SEED");
        return text ? std::strtoull(text, nullptr, 10) : 1;
    }();
    return value;
}

constexpr std::size_t STACK_BYTES = 128 * 1024;
// Stacks begin at different offsets in their pages, so that the fibers of a warp do not compete for the same cache
// lines.
constexpr std::size_t COLOURS = 32, COLOUR_BYTES = 512;

struct Stack {
    char *top;
};

struct Copy {
    void *to;
    const void *from;
    bool valid;
};

class Worker;

struct Fiber : Thread {
    Worker *worker;
    Stack *stack; // null before the first step and after the last
    void *stack_pointer;
    unsigned warp;

    // The collective operation or barrier at which the fiber waits.
    const char *operation;
    unsigned mask;
    Combine combine;
    void *arguments;

    std::vector<Copy> copies;
    std::vector<std::size_t> groups; // for each committed group that may be in progress, the end of its copies

    unsigned bit() const { return 1u << lane; }
};

// Sets of lanes.
struct Warp {
    unsigned alive;
    unsigned runnable;
    unsigned collecting;
    unsigned at_barrier;
};

// Runs one block at a time.
class Worker {
  public:
    Worker();
    void run_block(const Launch &launch, std::uint64_t block);

    unsigned block_barrier(Fiber &fiber, const char *operation, bool predicate);
    void collective(Fiber &fiber, const char *operation, unsigned mask, Combine combine, void *arguments);
    [[noreturn]] void finished(Fiber &fiber);
    [[noreturn]] void fail(const Fiber *fiber, const char *format, ...) const __attribute__((format(printf, 3, 4)));
    const Fiber *current() const { return current_; }

  private:
    void prepare(const Launch &launch, Index block);
    void run_warp(Warp &warp, unsigned first, Random &random);
    void resume(Fiber &fiber);
    void start(Fiber &fiber);
    void suspend(Fiber &fiber);
    void open_barrier();
    [[noreturn]] void fail_stuck() const;
    Stack *take_stack();

    const Launch *launch_ = nullptr;
    std::vector<Fiber> fibers_;
    std::vector<Warp> warps_;
    std::vector<Stack *> spare_;
    std::size_t stacks_ = 0;
    char *shared_;
    unsigned threads_ = 0, alive_ = 0, waiting_ = 0, votes_ = 0, result_ = 0;
    const char *barrier_ = nullptr;
    Fiber *current_ = nullptr;
    void *scheduler_stack_ = nullptr;
};

thread_local Worker *active_worker = nullptr;
thread_local const char *activity = nullptr;

// ---- what kernels call

Fiber &fiber_of(Thread &thread) { return static_cast<Fiber &>(thread); }

unsigned block_barrier(Thread &thread, const char *operation, bool predicate) {
    return fiber_of(thread).worker->block_barrier(fiber_of(thread), operation, predicate);
}

void collective(Thread &thread, const char *operation, unsigned mask, Combine combine, void *arguments) {
    fiber_of(thread).worker->collective(fiber_of(thread), operation, mask, combine, arguments);
}

void copy_begin(Thread &thread, void *to, const void *from, bool valid) {
    Fiber &fiber = fiber_of(thread);
    if (reinterpret_cast<std::uintptr_t>(to) % 16 != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0)
        fiber.worker->fail(&fiber, "copy_async: %p to %p is not aligned to 16 bytes", from, to);
    fiber.copies.push_back({to, from, valid});
}

void copy_commit(Thread &thread) { fiber_of(thread).groups.push_back(fiber_of(thread).copies.size()); }

void carry_out(Fiber &fiber, std::size_t count) {
    for (std::size_t i = 0; i < count; i++) {
        const Copy &copy = fiber.copies[i];
        if (copy.valid)
            std::memcpy(copy.to, copy.from, 16);
        else
            std::memset(copy.to, 0, 16);
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + count);
}

void copy_wait(Thread &thread, unsigned groups_left) {
    Fiber &fiber = fiber_of(thread);
    if (fiber.groups.size() <= groups_left) return;
    std::size_t done = fiber.groups.size() - groups_left;
    std::size_t copies = fiber.groups[done - 1];
    carry_out(fiber, copies);
    fiber.groups.erase(fiber.groups.begin(), fiber.groups.begin() + done);
    for (std::size_t &end : fiber.groups) end -= copies;
}

[[noreturn]] void fail(const char *message) { active_worker->fail(active_worker->current(), "%s", message); }

const Services SERVICES = {block_barrier, collective, copy_begin, copy_commit, copy_wait, fail};

// ---- one block

Worker::Worker() : fibers_(MAX_BLOCK), warps_(MAX_BLOCK / WARP), shared_(map_guarded(round_up(MAX_SHARED, PAGE))) {
    for (unsigned i = 0; i < MAX_BLOCK; i++) {
        Fiber &fiber = fibers_[i];
        fiber.worker = this;
        fiber.warp = i / WARP;
        fiber.lane = i % WARP;
        fiber.services = &SERVICES;
    }
}

Stack *Worker::take_stack() {
    if (spare_.empty()) {
        char *memory = map_guarded(STACK_BYTES);
        spare_.push_back(new Stack{memory + STACK_BYTES - stacks_++ % COLOURS * COLOUR_BYTES});
    }
    Stack *stack = spare_.back();
    spare_.pop_back();
    return stack;
}

// Fills shared memory with NaN, to expose reads of memory that was never written.
void Worker::prepare(const Launch &launch, Index block) {
    launch_ = &launch;
    std::size_t shared_bytes = round_up(launch.dynamic_shared, 16);
    char *dynamic_shared = shared_ + round_up(MAX_SHARED, PAGE) - shared_bytes;
    std::memset(dynamic_shared, 0xFF, shared_bytes);
    const StaticShared &fixed = launch.static_shared;
    if (fixed.bytes > 0) std::memset(static_cast<char *>(fixed.anchor()) - fixed.anchor_offset, 0xFF, fixed.bytes);

    threads_ = alive_ = launch.block.x * launch.block.y * launch.block.z;
    Index index = {0, 0, 0};
    for (unsigned i = 0; i < threads_; i++) {
        Fiber &fiber = fibers_[i];
        fiber.thread_index = index;
        fiber.block_index = block;
        fiber.block_size = launch.block;
        fiber.grid_size = launch.grid;
        fiber.dynamic_shared = reinterpret_cast<unsigned char *>(dynamic_shared);
        fiber.stack = nullptr;
        if (++index.x == launch.block.x) index.x = 0, index.y++;
        if (index.y == launch.block.y) index.y = 0, index.z++;
    }
    for (unsigned first = 0; first < threads_; first += WARP) {
        unsigned lanes = std::min(WARP, threads_ - first);
        unsigned all = lanes == WARP ? ~0u : (1u << lanes) - 1;
        warps_[first / WARP] = {all, all, 0, 0};
    }
}

void Worker::run_block(const Launch &launch, std::uint64_t block) {
    std::uint64_t x = block % launch.grid.x, rest = block / launch.grid.x;
    prepare(launch, {unsigned(x), unsigned(rest % launch.grid.y), unsigned(rest / launch.grid.y)});
    Random random(seed() * 0xD1342543DE82EF95u + block);
    unsigned warps = (threads_ + WARP - 1) / WARP;
    unsigned order[MAX_BLOCK / WARP];
    std::iota(order, order + warps, 0u);
    while (alive_ > 0) {
        for (unsigned i = warps; i > 1; i--) std::swap(order[i - 1], order[random.below(i)]);
        for (unsigned i = 0; i < warps; i++) run_warp(warps_[order[i]], order[i] * WARP, random);
        if (alive_ == 0) break;
        if (waiting_ != alive_) fail_stuck();
        open_barrier();
    }
}

// Runs lanes until all have returned, or wait for other warps or for a lane that will not arrive.
void Worker::run_warp(Warp &warp, unsigned first, Random &random) {
    while (warp.runnable != 0) {
        unsigned step = random.below(WARP) | 1, lane = random.below(WARP);
        for (unsigned i = 0; i < WARP; i++, lane = (lane + step) % WARP)
            if (warp.runnable >> lane & 1) resume(fibers_[first + lane]);
    }
}

void Worker::resume(Fiber &fiber) {
    if (!fiber.stack) start(fiber);
    current_ = &fiber;
    ulmus_switch(&scheduler_stack_, fiber.stack_pointer);
    current_ = nullptr;
}

// Prepares a stack for `ulmus_switch`.
void Worker::start(Fiber &fiber) {
    fiber.stack = take_stack();
    auto *top = reinterpret_cast<std::uint64_t *>(fiber.stack->top) - 2;
    top[0] = top[1] = 0; // where a debugger would look for callers
    top[-1] = reinterpret_cast<std::uint64_t>(&ulmus_fiber_entry);
    top[-2] = 0;                                                          // rbp
    top[-3] = 0;                                                          // rbx
    top[-4] = reinterpret_cast<std::uint64_t>(launch_->kernel->call);     // r12
    top[-5] = reinterpret_cast<std::uint64_t>(launch_->parameters);       // r13
    top[-6] = 0;                                                          // r14
    top[-7] = reinterpret_cast<std::uint64_t>(static_cast<Thread *>(&fiber)); // r15
    fiber.stack_pointer = top - 7;
}

void Worker::suspend(Fiber &fiber) {
    warps_[fiber.warp].runnable &= ~fiber.bit();
    ulmus_switch(&fiber.stack_pointer, scheduler_stack_);
}

void Worker::finished(Fiber &fiber) {
    carry_out(fiber, fiber.copies.size());
    fiber.groups.clear();
    Warp &warp = warps_[fiber.warp];
    warp.alive &= ~fiber.bit();
    alive_--;
    spare_.push_back(fiber.stack);
    fiber.stack = nullptr;
    suspend(fiber);
    __builtin_unreachable();
}

unsigned Worker::block_barrier(Fiber &fiber, const char *operation, bool predicate) {
    if (waiting_ > 0 && std::strcmp(barrier_, operation) != 0)
        fail(&fiber, "waits at %s, other threads of the block at %s", operation, barrier_);
    barrier_ = fiber.operation = operation;
    votes_ += predicate;
    waiting_++;
    warps_[fiber.warp].at_barrier |= fiber.bit();
    suspend(fiber);
    return result_;
}

void Worker::open_barrier() {
    for (unsigned i = 0; i * WARP < threads_; i++) {
        warps_[i].runnable = warps_[i].at_barrier;
        warps_[i].at_barrier = 0;
    }
    result_ = votes_;
    votes_ = waiting_ = 0;
}

void Worker::collective(Fiber &fiber, const char *operation, unsigned mask, Combine combine, void *arguments) {
    Warp &warp = warps_[fiber.warp];
    if (!(mask & fiber.bit())) fail(&fiber, "%s: mask %08x lacks the calling lane", operation, mask);
    if (mask & ~warp.alive)
        fail(&fiber, "%s: mask %08x names lanes that have returned or never existed: %08x", operation, mask,
             mask & ~warp.alive);
    fiber.operation = operation;
    fiber.mask = mask;
    fiber.combine = combine;
    fiber.arguments = arguments;
    warp.collecting |= fiber.bit();
    if (mask & ~warp.collecting) return suspend(fiber);

    void *all[WARP] = {};
    const Fiber *lanes = &fibers_[fiber.warp * WARP];
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
        const Fiber &other = lanes[__builtin_ctz(rest)];
        if (other.mask != mask || other.combine != combine)
            fail(&fiber, "%s with mask %08x, but lane %u waits at %s with mask %08x", operation, mask, other.lane,
                 other.operation, other.mask);
        all[other.lane] = other.arguments;
    }
    combine(all, mask);
    warp.collecting &= ~mask;
    warp.runnable |= mask;
}

// ---- mistakes

void Worker::fail(const Fiber *fiber, const char *format, ...) const {
    std::fprintf(stderr, "emulator: kernel %s", launch_->name);
    if (fiber) {
        Index block = fiber->block_index, thread = fiber->thread_index;
        std::fprintf(stderr, ", block (%u, %u, %u), thread (%u, %u, %u)", block.x, block.y, block.z, thread.x, thread.y,
                     thread.z);
    }
    std::fputs(": ", stderr);
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fputc('\n', stderr);
    std::abort();
}

// No thread can run, and some do not wait at the barrier.
void Worker::fail_stuck() const {
    for (unsigned i = 0; i < threads_; i++) {
        const Fiber &fiber = fibers_[i];
        const Warp &warp = warps_[fiber.warp];
        if (!(warp.collecting & fiber.bit())) continue;
        unsigned missing = fiber.mask & ~warp.collecting;
        fail(&fiber,
             "deadlock: waits at %s with mask %08x for lanes %08x, of which %08x have returned and %08x wait at %s; "
             "%u of the block's %u threads wait there",
             fiber.operation, fiber.mask, missing, missing & ~warp.alive, missing & warp.at_barrier,
             barrier_ ? barrier_ : "a barrier", waiting_, alive_);
    }
    fail(nullptr, "deadlock");
}

struct sigaction previous_segv, previous_bus, previous_fpe;

// Reports what was running when forbidden memory was accessed. If it was not the emulator, the fault is left to the
// previous handler.
void on_fault(int signal, siginfo_t *info, void *) {
    if (!activity) {
        const struct sigaction &previous = signal == SIGSEGV  ? previous_segv
                                           : signal == SIGBUS ? previous_bus
                                                              : previous_fpe;
        sigaction(signal, &previous, nullptr);
        return;
    }
    char text[256] = "";
    if (signal == SIGFPE)
        std::snprintf(text, sizeof text, "integer division by zero");
    else if (info->si_code == SI_KERNEL)
        std::snprintf(text, sizeof text, "access to a misaligned or impossible address");
    else {
        int length = std::snprintf(text, sizeof text, "access to address %p, which is not allowed", info->si_addr);
        if (describe_address) describe_address(info->si_addr, text + length, sizeof text - length);
    }
    if (active_worker) active_worker->fail(active_worker->current(), "%s", text);
    std::fprintf(stderr, "emulator: %s: %s\n", activity, text);
    std::abort();
}

void catch_faults() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &previous_segv);
    sigaction(SIGBUS, &action, &previous_bus);
    sigaction(SIGFPE, &action, &previous_fpe);
}

// A stack for signal handlers, because a fault may be the overflow of a fiber's stack. The thread's own signal stack is
// too small for our message.
class SignalStack {
  public:
    SignalStack() : memory_(std::make_unique<char[]>(BYTES)) {
        stack_t ours = {};
        ours.ss_sp = memory_.get();
        ours.ss_size = BYTES;
        sigaltstack(&ours, nullptr);
    }

    ~SignalStack() {
        stack_t none = {};
        none.ss_flags = SS_DISABLE;
        sigaltstack(&none, nullptr);
    }

    void use() {}

  private:
    static constexpr std::size_t BYTES = 64 * 1024;
    std::unique_ptr<char[]> memory_;
};

thread_local SignalStack signal_stack;

// ---- all blocks of a launch

// Hands out the blocks of a launch in an order that differs from their numbers.
class Blocks {
  public:
    explicit Blocks(const Launch &launch)
        : launch(launch), count_(std::uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z) {
        Random random(seed() + count_);
        first_ = random.below(std::uint32_t(std::min<std::uint64_t>(count_, 1u << 31)));
        while (std::gcd(step_, count_) != 1) step_++;
    }

    std::uint64_t count() const { return count_; }

    bool take(std::uint64_t &block) {
        std::uint64_t i = next_++;
        if (i >= count_) return false;
        block = (first_ + i * step_) % count_;
        return true;
    }

    const Launch &launch;

  private:
    std::uint64_t count_, first_, step_ = 7919;
    std::atomic<std::uint64_t> next_{0};
};

// Runs blocks on a CPU thread. Workers, with all their stacks, are kept for the next launch.
void work(Blocks &blocks) {
    static std::mutex mutex;
    static auto &idle = *new std::vector<Worker *>;
    signal_stack.use();
    Worker *worker = nullptr;
    {
        std::lock_guard lock(mutex);
        if (!idle.empty()) worker = idle.back(), idle.pop_back();
    }
    if (!worker) worker = new Worker;
    active_worker = worker;
    Activity running(blocks.launch.name);
    for (std::uint64_t block; blocks.take(block);) worker->run_block(blocks.launch, block);
    active_worker = nullptr;
    std::lock_guard lock(mutex);
    idle.push_back(worker);
}

// A second CPU thread that runs a share of the blocks, of one launch at a time.
class Helper {
  public:
    Helper() { std::thread([this] { serve(); }).detach(); }

    void share(Blocks &blocks) {
        std::unique_lock turn(turn_, std::try_to_lock);
        if (turn) offer(&blocks);
        work(blocks);
        if (turn) withdraw();
    }

  private:
    void offer(Blocks *blocks) {
        std::lock_guard lock(mutex_);
        offered_ = blocks;
        changed_.notify_all();
    }

    void withdraw() {
        std::unique_lock lock(mutex_);
        offered_ = nullptr;
        changed_.wait(lock, [this] { return !busy_; });
    }

    void serve() {
        std::unique_lock lock(mutex_);
        while (true) {
            changed_.wait(lock, [this] { return offered_ != nullptr; });
            Blocks *blocks = std::exchange(offered_, nullptr);
            busy_ = true;
            lock.unlock();
            work(*blocks);
            lock.lock();
            busy_ = false;
            changed_.notify_all();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable changed_;
    Blocks *offered_ = nullptr;
    bool busy_ = false;
};

} // namespace

extern "C" __attribute__((visibility("hidden"))) void ulmus_fiber_finished(Thread *thread) {
    Fiber &fiber = fiber_of(*thread);
    fiber.worker->finished(fiber);
}

Activity::Activity(const char *name) : outer_(activity) {
    static std::once_flag once;
    std::call_once(once, catch_faults);
    signal_stack.use();
    activity = name;
}

Activity::~Activity() { activity = outer_; }

void run(const Launch &launch) {
    constexpr std::uint64_t WORTH_SHARING = 4096; // threads
    Blocks blocks(launch);
    std::uint64_t threads = blocks.count() * launch.block.x * launch.block.y * launch.block.z;
    if (blocks.count() < 2 || threads < WORTH_SHARING || std::thread::hardware_concurrency() < 2) return work(blocks);
    static Helper &helper = *new Helper; // never destroyed, because its thread never ends
    helper.share(blocks);
}

} // namespace ulmus
