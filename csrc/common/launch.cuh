// Launches. Nothing here synchronises, allocates, or changes the current device: a launch may be captured in a graph.
#pragma once

#include <string>

#include "device.cuh"
#include "error.h"

namespace mc::cuda {

constexpr int64_t kMostBlocks = 0x7fffffff;

#if defined(__CUDACC__)

// Kernels take one argument, a struct of at most 4 KB (what every architecture and toolkit takes).
// together: all blocks are on the device at once and may wait for each other (grid_barrier); there must not be more of
// them than fit.
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
        const auto memory = static_cast<size_t>(shared_bytes);
        const auto on = static_cast<cudaStream_t>(stream);
        status = together ? cudaLaunchCooperativeKernel(address, grid, block, pointers, memory, on)
                          : cudaLaunchKernel(address, grid, block, pointers, memory, on);
    }
    if (status == cudaSuccess) return;
    cudaGetLastError();  // the status tells it; the next caller of the runtime must not find it again
    throw Error(MC_DEVICE_ERROR, std::string(name) + ": " + cudaGetErrorString(status) + " (" +
                                     cudaGetErrorName(status) + ") at the launch of " + std::to_string(blocks) +
                                     " blocks of " + std::to_string(threads) + " threads");
}

inline int block_threads(int usual) { return usual; }

// Of the current device. Asks the runtime, not the device.
inline int attribute(cudaDeviceAttr what) {
    int device = 0, value = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, what, device);
    if (status == cudaSuccess) return value;
    cudaGetLastError();
    throw Error(MC_DEVICE_ERROR, std::string("the current device: ") + cudaGetErrorString(status));
}
inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
// Bytes of shared memory that a block may have.
inline int64_t shared_limit() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

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
    emulate::run(name, blocks, threads, shared_bytes, together, [&] { kernel(arguments); });
}

// Tests make blocks small: short inputs then take several steps, as long ones do on a GPU.
inline int block_threads(int usual) { return emulate::block_threads(usual); }
inline int multiprocessors() { return emulate::device().multiprocessors; }
inline int64_t shared_limit() { return emulate::device().shared_bytes; }

using emulate::Watched;

#endif

}  // namespace mc::cuda
