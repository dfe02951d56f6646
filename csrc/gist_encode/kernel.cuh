// gist_encode on a GPU: windows of embeddings through a small transformer. Contract: mc_kernels.h. Forward only.
//
// One kernel, a loop over stages (net.cuh), each cut into units that blocks take in turn. cuda.cu launches it
//   streaming  once for all stages, a block a multiprocessor, with a barrier of all blocks between stages: windows of up to
//              264 rows together (8 of 32 tokens, class tokens included)
//   bulk       once a stage, a chunk of windows after the other
//
// Floor, streaming: one read of the weights, 16 MB for the default net (Eg 512, F 1792, two layers) at E = 576 in bf16: 5
// us at 3.35 TB/s, 3.4 us at 4.8. Every block asks for its share of all weights to come to L2 before it begins, so that
// they stream at full rate while the first stages run. What stays are 13 barriers between 14 stages, 1 to 1.5 us each with
// the latency of a stage's first loads: an estimate of 20 to 25 us for one window, 4 to 5 times the floor. A unit is 16
// outputs by 32 rows with the inner dimension shared by eight warps: 96 units for queries, keys and values of one window,
// 112 for gate and up, 32 for the others, so that those leave most multiprocessors idle, each reading 16 to 57 KB.
//
// Why a barrier and not a chain of launches: a launch's end and the next one's start are 2 us and more where no graph holds
// them, a barrier is half of that; the chain is there as well, it is the bulk's.
//
// Floor, bulk: the matrix rate; 1.0 TFLOP a layer at N = 4096, 1.0 ms at 990 TFLOP/s. This does not come near: each unit
// loads its operands from L2 for 32 rows, without shared memory, 32 FLOPs a byte; the Python side leaves it to Triton.
//
// Widths: heads of up to 128. On tensor cores where blocks and weights are of one 16-bit dtype, widths multiples of 8 and
// rows on 16 bytes; else in fp32, whatever the layout.
#pragma once

#include "grid.cuh"
#include "pieces.cuh"
#include "product.cuh"

namespace mc::cuda {

MC_DEVICE void prefetch_rows(const Matrix& m, int layers, int rows, int64_t bytes) {
    const int64_t lines = (bytes + 127) / 128, all = layers * static_cast<int64_t>(rows) * lines;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < all; i += step) {
        prefetch(m.at(static_cast<int>(i / lines / rows), i / lines % rows) + i % lines * 128);
    }
}

MC_DEVICE void prefetch_weights(const EncodeCall& c) {
    const int64_t bytes = c.weights_dtype == 0 ? 4 : 2;
    prefetch_rows(c.w_in, 1, c.width, bytes * c.embed);
    prefetch_rows(c.qkv, c.layers, 3 * c.width, bytes * c.width);
    prefetch_rows(c.attn_out, c.layers, c.width, bytes * c.width);
    prefetch_rows(c.gate_up, c.layers, 2 * c.ffn, bytes * c.width);
    prefetch_rows(c.down, c.layers, c.width, bytes * c.ffn);
    prefetch_rows(c.w_out, 1, c.embed, bytes * c.width);
}

MC_BOTH int units_of(const EncodeCall& c, Step step, const Linear& linear) {
    return step == kAttend                   ? attend_units(c)
           : step == kPool || step == kMatch ? c.windows * c.gists
           : step == kFirst                  ? linear.units() + first_units(c)
                                             : linear.units();
}

template <class M>
__global__ void __launch_bounds__(kEncodeThreads, 1) encode(const __grid_constant__ EncodeCall c) {
    MC_SHARED_MEMORY(memory);
    if (c.together) prefetch_weights(c);
    for (int stage = c.first_stage; stage < c.last_stage; ++stage) {
        const Step step = c.step(stage);
        const Linear linear(c, step, step == kFirst || step >= kPool ? 0 : c.layer(stage));
        const int units = units_of(c, step, linear), blocks = static_cast<int>(gridDim.x);
        for (int unit = static_cast<int>(blockIdx.x); unit < units; unit += blocks) {
            if (step == kAttend) {
                attend<M>(c, SharedMemory(memory), unit);
            } else if (step == kPool) {
                pool<M>(c, SharedMemory(memory), unit);
            } else if (step == kMatch) {
                match<M>(c, SharedMemory(memory), unit);
            } else if (step == kFirst && unit >= linear.units()) {
                first_unit<M>(c, unit - linear.units());
            } else {
                product<M>(c, linear, SharedMemory(memory), unit);
            }
        }
        if (c.together && stage + 1 < c.last_stage && !MC_FAULT(21)) grid_barrier();
    }
}

}  // namespace mc::cuda
