// CUDA's words in plain C++: a grid runs on the CPU, each thread of a block as a fiber, and every access to global
// memory is checked. For tests of index arithmetic, bounds, barriers and races; nothing of it ships.
//
// - Blocks come in an order drawn from a seed, several at a time, and at every point where threads wait for each other
//   the next to run is drawn too. So a result that depends on an order differs from seed to seed.
// - `read` and `write` fail outside the elements of the views that the launch has named (watch.h), and where two threads
//   touch an element, one of them writing, without a barrier between them.
// - A kernel's threads must not keep C++ objects that own anything: a launch that fails abandons them.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#include "watch.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __restrict__
#define MC_DEVICE inline
#define MC_BOTH inline
#define MC_CALLED inline

namespace mc::emulate {

struct Index {
    unsigned x, y = 0, z = 0;
};

// Where the running fiber is.
struct Place {
    Index thread, block, block_size, grid_size;
};
const Place& place();

// Runs `kernel` once per thread of the grid. Throws Error(MC_DEVICE_ERROR) with what went wrong and where.
// together: all blocks are there at once, and may wait for each other (sync_grid).
void run(const char* name, int64_t blocks, int threads, int64_t shared_bytes, bool together,
         const std::function<void()>& kernel);

int block_threads(int usual);
// What host code is told of the device.
struct Device {
    int multiprocessors = 3;
    int64_t shared_bytes = 227 << 10;  // of a block, at most
};
const Device& device();
bool fault(int number);

// Ends the launch from within a thread.
[[noreturn]] void fail(const std::string& text);

void sync_block();
bool sync_block_or(bool flag);
void sync_grid();
void sync_warp();
// As `exchange`, but all lanes' words, three of each; zero for lanes that the block does not have.
using Words = std::array<uint64_t, 3>;
void exchange_all(const Words& mine, Words (&all)[32]);
// Every lane's 64 bits, exchanged by all lanes of the warp that have not ended; returns lane `from`'s.
uint64_t exchange(uint64_t mine, int from);
uint32_t ballot(bool flag);
// Lets others run: within a loop that waits for another thread.
void pause();
char* shared_memory(int64_t bytes_needed);
// Ends the launch where these bytes are not shared memory of the block.
void check_shared(const void* p, int64_t bytes);
// Asynchronous copies to shared memory: they arrive when their group is waited for, no earlier.
void copy_later(void* to, const void* bytes, int n);
void commit_copies();
void wait_for_copies(int groups_left);

}  // namespace mc::emulate

#define threadIdx (mc::emulate::place().thread)
#define blockIdx (mc::emulate::place().block)
#define blockDim (mc::emulate::place().block_size)
#define gridDim (mc::emulate::place().grid_size)
#define MC_SHARED_MEMORY(name) char* name = mc::emulate::shared_memory(0)
#define MC_FAULT(number) mc::emulate::fault(number)

inline void __syncthreads() { mc::emulate::sync_block(); }
inline int __syncthreads_or(int flag) { return mc::emulate::sync_block_or(flag != 0); }
inline void __syncwarp(unsigned = 0xffffffffu) { mc::emulate::sync_warp(); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { mc::emulate::pause(); }
inline unsigned __ballot_sync(unsigned, int flag) { return mc::emulate::ballot(flag != 0); }

template <class T>
T __shfl_sync(unsigned, T x, int from) {
    static_assert(sizeof(T) <= 8, "one exchange");
    uint64_t bits = 0;
    std::memcpy(&bits, &x, sizeof(T));
    bits = mc::emulate::exchange(bits, from);
    std::memcpy(&x, &bits, sizeof(T));
    return x;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lanes) {
    return __shfl_sync(mask, x, static_cast<int>(threadIdx.x % 32) ^ lanes);
}

inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}
using std::exp2;
using std::exp2f;
using std::floor;
using std::fmaf;
using std::log2f;
using std::rint;

namespace mc::cuda {

template <class T>
T read(const void* p) {
    emulate::check_access(p, sizeof(T), alignof(T), false);
    T x;
    std::memcpy(&x, p, sizeof(T));
    return x;
}

template <class T>
T read_constant(const void* p) {
    return read<T>(p);
}

inline void prefetch(const void* p) { emulate::check_access(p, 1, 1, false); }

template <class T>
void write(void* p, T x) {
    emulate::check_access(p, sizeof(T), alignof(T), true);
    std::memcpy(p, &x, sizeof(T));
}

}  // namespace mc::cuda

// Atomics run whole, since fibers change only where they wait.
template <class T>
T atomicAdd(T* p, T x) {
    mc::emulate::check_atomic(p, sizeof(T));
    const T before = *p;
    *p = before + x;
    return before;
}

template <class T>
T atomicExch(T* p, T x) {
    mc::emulate::check_atomic(p, sizeof(T));
    const T before = *p;
    *p = x;
    return before;
}
