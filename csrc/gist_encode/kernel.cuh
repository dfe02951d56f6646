// gist_encode on a GPU: windows of embeddings through a small transformer. Contract: mc_kernels.h. Forward only.
//
// Four ways (plan.cuh chooses by shape and device):
//   streaming  up to 264 rows together (8 windows of 32, class tokens included): one launch, a loop over stages (net.cuh),
//              each cut into units that blocks take in turn, a barrier of all blocks between; in 16 bits stream.cuh's
//              kernel, else this file's
//   resident   many windows: those of a block stay in its shared memory from the first product to the pooling (resident.cuh)
//   tiles      wider nets, and too few windows to give every multiprocessor a group: a launch a linear map (tiled.cuh)
//   units      fp32, mixed dtypes, odd widths and layouts: this file's kernel, a launch a stage, a chunk of windows at a time
//
// Floor, streaming: one read of the weights, 16 MB for the default net (Eg 512, F 1792, two layers) at E = 576 in bf16: 7
// us at an H100's 2.4 TB/s. Every block asks for its share of all weights to come to L2 before it begins, so that
// they stream at full rate while the first stages run. What stays are 13 barriers between 14 stages, 1.2 to 1.5 us each,
// and each stage's chain of loads and instructions: this file's kernel took 109 us on an H100, 6 us a stage beside the
// barrier, its attention and pooling 2 bytes a load. A unit is 16 outputs by 32 rows with the inner dimension shared by
// eight warps: 96 units for queries, keys and values of one window, 112 for gate and up, 32 for the others, so that those
// leave most multiprocessors idle, each reading 16 to 57 KB.
//
// Why a barrier and not a chain of launches: a launch's end and the next one's start are 2 us and more where no graph holds
// them, a barrier is half of that.
//
// Floor, bulk: the matrix rate; 2.1 TFLOP for N = 4096 of that net, 2.1 ms at the 990 TFLOP/s of an H100, 6.6 ms at the 312
// of an A100. Estimates, none measured:
//   mma.sync   does not get more than some 62% of an H100's rate, which takes wgmma: 610 TFLOP/s. All of an A100's.
//   L2         a group of 128 rows reads 7.6 MB of weights a layer, and scratch, 1.8 MB read and 1.0 written: 973 MFLOP, 94
//              FLOPs a byte, 510 TFLOP/s at 5.5 TB/s. 64 rows (A100): 54 FLOPs a byte, 240 TFLOP/s at 4.5 TB/s. Tiles of 128
//              by 256: 85 FLOPs a byte, 470 and 380 TFLOP/s.
//   the rest   a step of 32 (128 rows by 256 outputs, 2 MFLOP, 840 clocks) ends in a barrier of the block, a tile of 16 steps
//              in some hundred instructions a thread; attention, 2% of the FLOPs, waits for L2; the last wave: 10 to 25%
// Expected: 350 to 450 TFLOP/s on an H100, 35 to 45% of its rate; 180 to 220 on an A100, 60 to 70%. The target of 60% on an
// H100 needs wgmma, and weights brought to two multiprocessors at once.
//
// Products are this library's own in all ways. cuBLASLt would be a runtime beside it that has to be found when the library is
// loaded, on machines that have a driver and nothing else; what it does better (wgmma) it cannot do on activations that stay.
//
// Widths: heads of up to 128. On tensor cores where blocks and weights are of one 16-bit dtype, widths multiples of 8 and
// rows on 16 bytes; else in fp32, whatever the layout.
#pragma once

#include "grid.cuh"
#include "pieces.cuh"
#include "prefetch.cuh"
#include "product.cuh"

namespace mc::cuda {

// Units of the first stage's product.
MC_BOTH int products_of(const EncodeCall& c, const Linear& linear) { return c.beside ? 0 : linear.units(); }

MC_BOTH int units_of(const EncodeCall& c, Step step, const Linear& linear) {
    return step == kAttend                   ? attend_units(c)
           : step == kPool || step == kMatch ? c.windows * c.gists
           : step == kFirst                  ? products_of(c, linear) + first_units(c)
                                             : linear.units();
}

template <class M>
__global__ void __launch_bounds__(kEncodeThreads, 1) encode(const __grid_constant__ EncodeCall c) {
    MC_SHARED_MEMORY(memory);
    if (c.together) prefetch_weights(c, c.weights_dtype == 0 ? 4 : 2);
    for (int stage = c.first_stage; stage < c.last_stage; ++stage) {
        const Step step = c.step(stage);
        const Linear linear(c, step, step == kFirst || step >= kPool ? 0 : c.layer(stage));
        const int units = units_of(c, step, linear), blocks = static_cast<int>(gridDim.x);
        for (int unit = static_cast<int>(blockIdx.x); unit < units; unit += blocks) {
            if (step == kAttend) {
                attend<M>(c, SharedMemory(memory), unit);
            } else if (step == kPool) {
                const int64_t first = static_cast<int64_t>(unit / c.gists) * c.rows_each;
                pool<M>(c, SharedMemory(memory), unit,
                        [&](int j, int i) { return load<M>(row_of<M>(c.h, first + j, c.width), i); });
            } else if (step == kMatch) {
                match<M>(c, SharedMemory(memory), unit);
            } else if (step == kFirst && unit >= products_of(c, linear)) {
                first_unit<M>(c, unit - products_of(c, linear));
            } else {
                product<M>(c, linear, SharedMemory(memory), unit);
            }
        }
        if (c.together && stage + 1 < c.last_stage && !MC_FAULT(21)) grid_barrier();
    }
}

}  // namespace mc::cuda
