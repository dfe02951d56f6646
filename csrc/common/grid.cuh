// A barrier of the whole grid, and asynchronous copies to shared memory.
#pragma once

#include "device.cuh"

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_pipeline_primitives.h>
#endif

namespace mc::cuda {

// For launches with all blocks together. Writes before it are seen by all blocks after it, if they use `read`.
MC_DEVICE void grid_barrier() {
#if defined(__CUDACC__)
    cooperative_groups::this_grid().sync();
#else
    emulate::sync_grid();
#endif
}

// 16 bytes from global to shared memory, both on 16; zeros where not `valid` (`from` is not read then).
MC_DEVICE void copy_async(void* to, const void* from, bool valid) {
#if defined(__CUDACC__)
    __pipeline_memcpy_async(to, from, 16, valid ? 0 : 16);
#else
    Pack<uint32_t, 4> bits{};
    if (valid) bits = read<Pack<uint32_t, 4> >(from);
    emulate::copy_later(to, &bits, 16);
#endif
}

// The thread's copies since the last commit are a group.
MC_DEVICE void commit_copies() {
#if defined(__CUDACC__)
    __pipeline_commit();
#else
    emulate::commit_copies();
#endif
}

// Until all of the thread's groups but the last N have arrived.
template <int N>
MC_DEVICE void wait_for_copies() {
#if defined(__CUDACC__)
    __pipeline_wait_prior(N);
#else
    emulate::wait_for_copies(N);
#endif
}

}  // namespace mc::cuda
