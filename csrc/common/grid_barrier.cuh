// A barrier of all blocks of a grid. They have to run together: a cooperative launch (launch.cuh).
#pragma once

#include "device.cuh"

namespace mc::cuda {

// counter: 0 when the kernel starts, on a line of its own. passed: barriers that this grid has passed, 0 at first. What was
// written before it by any block is seen after it by all: thread 0's fence follows its block's writes by the block's
// barrier, and empties its multiprocessor's L1.
MC_DEVICE void grid_barrier(uint32_t* counter, uint32_t& passed) {
    ++passed;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(counter, 1u);
        while (atomicAdd(counter, 0u) < passed * gridDim.x) __nanosleep(20);
        __threadfence();
#if !defined(__CUDACC__)
        emulate::passed_grid_barrier();
#endif
    }
    __syncthreads();
}

}  // namespace mc::cuda
