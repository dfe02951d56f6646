// Launches. Nothing here synchronises, allocates, or changes the current device: a launch may be captured in a graph.
#pragma once

#include <string>

#include "device.cuh"
#include "error.h"

namespace mc::cuda {

constexpr int64_t kMostBlocks = 0x7fffffff;

#if defined(__CUDACC__)

// Kernels take one argument, a struct of at most 4 KB (what every architecture and toolkit takes). together: all blocks run
// at the same time, or the launch is refused.
template <class Arguments>
void launch(const char* name, void (*kernel)(const Arguments), int64_t blocks, int threads, int64_t shared_bytes,
            void* stream, const Arguments& arguments, bool together = false) {
    static_assert(sizeof(Arguments) <= 4096, "kernel arguments");
    const void* address = reinterpret_cast<const void*>(kernel);
    cudaError_t status = cudaSuccess;
    if (shared_bytes > (48 << 10)) {
        status =
            cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    }
    if (status == cudaSuccess) {
        void* pointers[] = {const_cast<Arguments*>(&arguments)};
        const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
        const size_t bytes = static_cast<size_t>(shared_bytes);
        const auto on = static_cast<cudaStream_t>(stream);
        status = together ? cudaLaunchCooperativeKernel(address, grid, block, pointers, bytes, on)
                          : cudaLaunchKernel(address, grid, block, pointers, bytes, on);
    }
    if (status == cudaSuccess) return;
    cudaGetLastError();  // the status tells it; the next caller of the runtime must not find it again
    throw Error(MC_DEVICE_ERROR, std::string(name) + ": " + cudaGetErrorString(status) + " (" +
                                     cudaGetErrorName(status) + ") at the launch of " + std::to_string(blocks) +
                                     " blocks of " + std::to_string(threads) + " threads");
}

inline int block_threads(int usual) { return usual; }

// Of the current device. Sizes of a workspace depend on it; where there is no device nothing will be launched, and it is
// asked for an H100's.
inline int64_t multiprocessors() {
    int device = 0, count = 0;
    if (cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess) {
        return count;
    }
    cudaGetLastError();
    return 132;
}

// Of so many blocks, one a multiprocessor: how many a launch `together` may have.
inline int64_t blocks_together(int64_t blocks) { return blocks < multiprocessors() ? blocks : multiprocessors(); }

// What a launch may touch is known to the emulation alone.
class Watched {
public:
    void view(const char*, const mc_tensor&, bool) {}
    void array(const char*, const void*, int64_t, bool) {}
    void shared_array(const char*, const void*, int64_t) {}
};

#else

template <class Arguments>
void launch(const char* name, void (*kernel)(const Arguments), int64_t blocks, int threads, int64_t shared_bytes, void*,
            const Arguments& arguments, bool together = false) {
    static_assert(sizeof(Arguments) <= 4096, "kernel arguments");
    if (together && blocks > emulate::resident_blocks()) {
        throw Error(MC_DEVICE_ERROR, std::string(name) + ": blocks do not fit at the same time");
    }
    emulate::run(name, blocks, threads, shared_bytes, [&] { kernel(arguments); });
}

// Tests make blocks small: short inputs then take several steps, as long ones do on a GPU.
inline int block_threads(int usual) { return emulate::block_threads(usual); }

inline int64_t multiprocessors() { return 4; }
inline int64_t blocks_together(int64_t blocks) { return blocks < emulate::resident_blocks() ? blocks : emulate::resident_blocks(); }

using emulate::Watched;

#endif

}  // namespace mc::cuda
