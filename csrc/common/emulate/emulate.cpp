// Fibers for the threads of a grid, and who runs next. See emulate.h.
#include "emulate.h"

#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include "../error.h"
#include "scheduler.h"

namespace mc::emulate {
namespace {

constexpr size_t kStack = 64 << 10;
constexpr int kWarp = 32;
constexpr int64_t kMostPauses = 1 << 20;

enum class State { kReady, kBlock, kWarp, kGrid, kEnded };

struct Block;

struct Copy {
    void* to;
    char bytes[16];
    int n;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    State state = State::kEnded;
    Place place;
    Block* block = nullptr;
    Words given = {};                       // to a warp's exchange
    bool flag = false;                      // to a block's barrier
    std::vector<std::vector<Copy>> groups;  // of copies that have not arrived; the last one is open
};

struct Block {
    int64_t epoch = 0;
    bool any = false;  // of the flags at the last barrier
    std::vector<Fiber*> fibers;
    std::unique_ptr<char[]> shared;
    std::vector<Words> exchanged;
};

struct Launch {
    const std::function<void()>* kernel = nullptr;
    std::string name, error;
    int64_t shared_bytes = 0, pauses = 0, grid_epoch = 0;
    std::mt19937_64 random;
    ucontext_t scheduler;
    Fiber* running = nullptr;
};

std::mutex one_launch;
Launch launch;
std::vector<std::unique_ptr<Fiber>> pool;
uint64_t seed = 0;
int resident = 2, threads_wanted = 0, fault_wanted = 0;
Device current_device;
std::string launched;

void leave(State state) {
    Fiber* self = launch.running;
    self->state = state;
    swapcontext(&self->context, &launch.scheduler);
}

void body() {
    (*launch.kernel)();
    leave(State::kEnded);
}

// Threads that wait are let go when all that have not ended wait at the same place.
void release(Block& b) {
    const auto all = [&](auto first, auto last, State s) {
        bool some = false;
        for (auto f = first; f != last; ++f) {
            if ((*f)->state != s && (*f)->state != State::kEnded) return false;
            some = some || (*f)->state == s;
        }
        return some;
    };
    if (all(b.fibers.begin(), b.fibers.end(), State::kBlock)) {
        ++b.epoch;
        b.any = false;
        for (Fiber* f : b.fibers) {
            if (f->state == State::kBlock) b.any = b.any || f->flag, f->state = State::kReady;
        }
        return;
    }
    for (size_t w = 0; w < b.fibers.size(); w += kWarp) {
        const auto first = b.fibers.begin() + static_cast<int64_t>(w);
        const auto last = b.fibers.begin() + static_cast<int64_t>(std::min(w + kWarp, b.fibers.size()));
        if (!all(first, last, State::kWarp)) continue;
        for (auto f = first; f != last; ++f) {
            b.exchanged[static_cast<size_t>((*f)->place.thread.x)] = (*f)->given;
            if ((*f)->state == State::kWarp) (*f)->state = State::kReady;
        }
    }
}

void start(Block& b, Index block, Index block_size, Index grid_size) {
    b.epoch = 0;
    b.exchanged.assign(block_size.x, Words{});
    if (launch.shared_bytes) {
        b.shared.reset(new char[static_cast<size_t>(launch.shared_bytes)]);
        std::memset(b.shared.get(), 0xff, static_cast<size_t>(launch.shared_bytes));  // NaN, until it is written
    }
    for (unsigned t = 0; t < block_size.x; ++t) {
        Fiber& f = *b.fibers[t];
        f.place = {{t}, block, block_size, grid_size};
        f.block = &b;
        f.state = State::kReady;
        f.groups.assign(1, {});
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.get();
        f.context.uc_stack.ss_size = kStack;
        f.context.uc_link = nullptr;
        makecontext(&f.context, body, 0);
    }
}

[[noreturn]] void give_up(const std::string& text) { throw Error(MC_DEVICE_ERROR, launch.name + ": " + text); }

// Until a thread of the resident blocks ends its block; which thread runs is drawn anew each time.
void step(std::vector<Block>& blocks, std::vector<Fiber*>& ready) {
    ready.clear();
    for (Block& b : blocks) {
        for (Fiber* f : b.fibers) {
            if (f->state == State::kReady) ready.push_back(f);
        }
    }
    if (ready.empty()) give_up("threads wait for each other: some at a barrier that others do not come to");
    std::shuffle(ready.begin(), ready.end(), launch.random);
    for (Fiber* f : ready) {
        launch.running = f;
        swapcontext(&launch.scheduler, &f->context);
        launch.running = nullptr;
        if (!launch.error.empty()) give_up(launch.error);
    }
    for (Block& b : blocks) release(b);
    const auto waits = [](const Fiber* f) { return f->state == State::kGrid; };
    const auto all_wait = [&](const Block& b) { return std::all_of(b.fibers.begin(), b.fibers.end(), waits); };
    if (!std::all_of(blocks.begin(), blocks.end(), all_wait)) return;
    ++launch.grid_epoch;
    for (Block& b : blocks) {
        for (Fiber* f : b.fibers) f->state = State::kReady;
    }
}

}  // namespace

const Place& place() { return launch.running->place; }
int64_t epoch() { return launch.running->block->epoch; }
int64_t grid_epoch() { return launch.grid_epoch; }
const Device& device() { return current_device; }
bool fault(int number) { return number == fault_wanted; }
int block_threads(int usual) { return threads_wanted ? std::min(threads_wanted, usual) : usual; }

void run(const char* name, int64_t n_blocks, int threads, int64_t shared_bytes, bool together,
         const std::function<void()>& kernel) {
    const std::lock_guard<std::mutex> lock(one_launch);
    if (shared_bytes > current_device.shared_bytes) {
        throw Error(MC_DEVICE_ERROR, std::string(name) + ": " + std::to_string(shared_bytes) +
                                         " bytes of shared memory for a block, the device has " +
                                         std::to_string(current_device.shared_bytes));
    }
    launched += std::string(launched.empty() ? "" : "; ") + name;
    launch.kernel = &kernel;
    launch.name = name;
    launch.error.clear();
    launch.shared_bytes = shared_bytes;
    launch.pauses = launch.grid_epoch = 0;
    launch.random.seed(seed);
    forget_accesses();
    std::vector<int64_t> order(static_cast<size_t>(n_blocks));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), launch.random);
    const size_t width = static_cast<size_t>(together ? n_blocks : std::min<int64_t>(resident, n_blocks));
    while (pool.size() < width * static_cast<size_t>(threads)) pool.push_back(std::make_unique<Fiber>());
    std::vector<Block> blocks(width);
    for (size_t i = 0, f = 0; i < width; ++i) {
        for (int t = 0; t < threads; ++t) blocks[i].fibers.push_back(pool[f++].get());
        for (Fiber* fiber : blocks[i].fibers) fiber->state = State::kEnded;
    }
    std::vector<Fiber*> ready;
    const Index block_size{static_cast<unsigned>(threads)}, grid_size{static_cast<unsigned>(n_blocks)};
    for (size_t next = 0;;) {
        bool busy = false;
        for (Block& b : blocks) {
            const auto ended = [](const Fiber* f) { return f->state == State::kEnded; };
            if (next < order.size() && std::all_of(b.fibers.begin(), b.fibers.end(), ended)) {
                start(b, {static_cast<unsigned>(order[next++])}, block_size, grid_size);
            }
            busy = busy || !std::all_of(b.fibers.begin(), b.fibers.end(), ended);
        }
        if (!busy) return;
        step(blocks, ready);
    }
}

void fail(const std::string& text) {
    const Place& p = place();
    launch.error = "block " + std::to_string(p.block.x) + ", thread " + std::to_string(p.thread.x) + ": " + text;
    leave(State::kEnded);
    std::abort();  // a thread that has failed is not run again
}

void sync_block() { sync_block_or(false); }

bool sync_block_or(bool flag) {
    launch.running->flag = flag;
    leave(State::kBlock);
    return launch.running->block->any;
}

void sync_grid() { leave(State::kGrid); }

uint64_t exchange(uint64_t mine, int from) {
    Fiber* self = launch.running;
    self->given[0] = mine;
    leave(State::kWarp);
    const size_t first = self->place.thread.x / kWarp * kWarp;
    // Lanes that the block does not have give zero, and a lane that goes on alone must not overwrite what others read.
    const size_t at = first + static_cast<size_t>(from & (kWarp - 1));
    return at < self->block->exchanged.size() ? self->block->exchanged[at][0] : 0;
}

void exchange_all(const Words& mine, Words (&all)[32]) {
    Fiber* self = launch.running;
    self->given = mine;
    leave(State::kWarp);
    const size_t first = self->place.thread.x / kWarp * kWarp, n = self->block->exchanged.size();
    for (size_t i = 0; i < kWarp; ++i) all[i] = first + i < n ? self->block->exchanged[first + i] : Words{};
}

void sync_warp() { exchange(0, 0); }

uint32_t ballot(bool flag) {
    Fiber* self = launch.running;
    self->given[0] = flag;
    leave(State::kWarp);
    const size_t first = self->place.thread.x / kWarp * kWarp, n = self->block->exchanged.size();
    uint32_t out = 0;
    for (size_t i = first; i < std::min(first + kWarp, n); ++i) {
        out |= self->block->exchanged[i][0] ? 1u << (i - first) : 0u;
    }
    return out;
}

void pause() {
    if (++launch.pauses > kMostPauses) fail("waits without end for another thread");
    leave(State::kReady);
}

void copy_later(void* to, const void* bytes, int n) {
    Copy c{to, {}, n};
    std::memcpy(c.bytes, bytes, static_cast<size_t>(n));
    launch.running->groups.back().push_back(c);
}

void commit_copies() { launch.running->groups.emplace_back(); }

void wait_for_copies(int groups_left) {
    auto& groups = launch.running->groups;
    while (groups.size() > static_cast<size_t>(groups_left) + 1) {
        for (const Copy& c : groups.front()) std::memcpy(c.to, c.bytes, static_cast<size_t>(c.n));
        groups.erase(groups.begin());
    }
}

char* shared_memory(int64_t bytes_needed) {
    if (bytes_needed > launch.shared_bytes) {
        fail("needs " + std::to_string(bytes_needed) + " bytes of shared memory, has " +
             std::to_string(launch.shared_bytes));
    }
    return launch.running->block->shared.get();
}

void check_shared(const void* p, int64_t bytes) {
    const int64_t at = static_cast<const char*>(p) - launch.running->block->shared.get();
    if (at < 0 || at + bytes > launch.shared_bytes) {
        fail("byte " + std::to_string(at) + " of " + std::to_string(launch.shared_bytes) + " in shared memory");
    }
}

}  // namespace mc::emulate

// How tests steer it. threads: of a block, 0 for what the host code chooses; blocks: how many run at a time; fault: the
// deliberate error of that number, 0 for none.
extern "C" MC_API void mc_emulate(uint64_t seed, int32_t threads, int32_t blocks, int32_t fault) {
    mc::emulate::seed = seed;
    mc::emulate::threads_wanted = threads;
    mc::emulate::resident = std::max(blocks, 1);
    mc::emulate::fault_wanted = fault;
    mc::emulate::launched.clear();
}

// Names of what has been launched since the last mc_emulate, in order.
extern "C" MC_API const char* mc_emulate_launches() { return mc::emulate::launched.c_str(); }

// The device that host code finds.
extern "C" MC_API void mc_emulate_device(int32_t multiprocessors, int64_t shared_bytes) {
    mc::emulate::current_device = {multiprocessors, shared_bytes};
}
