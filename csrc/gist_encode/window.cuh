// One window of up to 32 rows in 16 bits, for latency, on devices whose multiprocessors together hold the whole net in
// shared memory (sm_90 and later; the default net's 16 MB are 123 KB each on 132): what window_kernel.cuh is made of.
//
// What a launch of stages waits for (stream.cuh, 81 us on an H100 where the weights' read takes 7) is no memory but the
// chain of each stage: some 1,000 instructions of a warp out of 196 KB of code, of which a cold cache of instructions
// fetches 8 at a time, and 13 barriers. So here
//   - a block asks for its rows of all weights when it begins, one bulk copy a row: they pass the barriers by;
//   - a unit is 16 rows of a weight, or 8 rows and their partners, times the window: one operand of the tensor cores. The
//     warps of a block share its inner dimension; nothing is tested, since sizes are whole chunks and rows beyond the
//     last are the last again;
//   - stages are handed out in turn, one behind the other, so that shared memory fills evenly;
//   - behind the first barrier a block waits for the flags of those that have units of the stage before, all at once, in
//     place of a counter: a write and a read of L2, no addition that waits for its result. Who writes over a buffer has
//     waited, through the stages between, for all that have read it.
// Flags are in the workspace, whatever it holds: each block clears its own before the first barrier, which is the grid's.
#pragma once

#include "fragments.cuh"
#include "grid.cuh"
#include "launch.cuh"
#include "product.cuh"

namespace mc::cuda {

constexpr int kWindowThreads = 256, kWindowRows = 32, kWindowHead = 64, kUnitWeights = 16, kMostFlags = 256, kMostStages = 32;
// Sums of a warp [32 rows, 16 weights], rows 20 apart: lanes that write hit different banks.
constexpr int kWindowStep = 20, kWindowSums = kWindowRows * kWindowStep;

// Units of a stage, the block that has the first of them, bytes from row to row of its weights in shared memory (rows half
// of the banks apart).
struct StageUnits {
    int units, base;
    MC_BOTH static int row_bytes(int inner) { return 2 * inner + (inner % 64 == 0 ? 64 : 0); }
    // Down's first: they are the largest.
    MC_BOTH StageUnits(const EncodeCall& c, Step step, int layer, int blocks) {
        const int width = c.width / kUnitWeights, qkv = 3 * width, gate_up = c.ffn / (kUnitWeights / 2);
        const int outs = (c.layers + 1) * width, gates = outs + c.layers * (qkv + width);
        units = step == kQkv ? qkv : step == kGateUp ? gate_up : step == kProject ? c.embed / kUnitWeights : width;
        base = step == kDown        ? layer * width
               : step == kFirst     ? c.layers * width
               : step == kQkv       ? outs + layer * qkv
               : step == kAttendOut ? outs + c.layers * qkv + layer * width
               : step == kGateUp    ? gates + layer * gate_up
                                    : gates + c.layers * gate_up;
        base %= blocks;
    }
    // Of a block: its first unit, how many it has.
    MC_BOTH int first(int block, int blocks) const { return block < base ? block - base + blocks : block - base; }
    MC_BOTH int of(int block, int blocks) const {
        const int from = first(block, blocks);
        return from < units ? (units - from + blocks - 1) / blocks : 0;
    }
};

MC_BOTH bool is_product(Step step) { return step != kAttend && step != kPool && step != kMatch; }

// Shared memory: sums and squares of warps (or pooling's parts and its sum), then the weights.
struct WindowMemory {
    Span<float> sums, squares;
    Span<uint64_t> arrivals;
    Span<char> weights;

    static MC_BOTH int64_t numbers(int width, int warps) {
        const int64_t sums = static_cast<int64_t>(warps) * kWindowSums, parts = static_cast<int64_t>(warps + 1) * width;
        return sums > parts ? sums : parts;
    }
    MC_DEVICE WindowMemory(SharedMemory shared, const EncodeCall& c, int warps)
        : sums(shared.take<float>(numbers(c.width, warps))),
          squares(shared.take<float>((warps + 2) * kWindowRows)),
          arrivals(shared.take<uint64_t>(kMostStages)),
          weights(shared.take<char>(c.window_bytes)) {}
    static int64_t bytes(const EncodeCall& c, int64_t warps) {
        return shared_bytes_of<float>(numbers(c.width, static_cast<int>(warps))) +
               shared_bytes_of<float>((warps + 2) * kWindowRows) + shared_bytes_of<uint64_t>(kMostStages) +
               shared_bytes_of<char>(c.window_bytes);
    }
};

// Whether the current device has copies of whole rows to shared memory.
inline bool copies_rows() {
#if defined(__CUDACC__)
    return attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
#else
    return true;
#endif
}

// Bytes of weights of the block that has most.
inline int64_t most_weights(const EncodeCall& c, int blocks) {
    int64_t held[kMostFlags] = {}, most = 0;
    for (int s = 0; s < c.stages(); ++s) {
        const Step step = c.step(s);
        if (!is_product(step)) continue;
        const int layer = step == kFirst || step == kProject ? 0 : c.layer(s);
        const StageUnits u(c, step, layer, blocks);
        const int64_t each = kUnitWeights * StageUnits::row_bytes(Linear(c, step, layer).inner);
        for (int b = 0; b < blocks; ++b) held[b] += u.units / blocks * each;
        for (int i = 0; i < u.units % blocks; ++i) held[(u.base + i) % blocks] += each;
    }
    for (int b = 0; b < blocks; ++b) most = std::max(most, held[b]);
    return most;
}

// Copies of whole rows, and the wait for a stage's.
MC_DEVICE uint32_t shared_address(const void* p) {
#if defined(__CUDACC__)
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#else
    static_cast<void>(p);
    return 0;
#endif
}

MC_DEVICE void expect_arrivals(uint64_t* arrivals, int stages) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    for (int s = 0; s < stages; ++s) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(arrivals + s)) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
    static_cast<void>(arrivals), static_cast<void>(stages);
#endif
}

MC_DEVICE void expect_bytes(uint64_t* arrival, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrival)), "r"(bytes)
                 : "memory");
#else
    static_cast<void>(arrival), static_cast<void>(bytes);
#endif
}

MC_DEVICE void copy_row(char* to, const char* from, int bytes, uint64_t* arrival) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(to)),
        "l"(from), "r"(bytes), "r"(shared_address(arrival))
        : "memory");
#else
    static_cast<void>(arrival);
    for (int i = 0; i < bytes; i += 16) copy_async(to + i, from + i, true);
#endif
}

// Under emulation a thread that has copied waits for its own, which a barrier of the block has to follow.
MC_DEVICE void wait_for_rows(uint64_t* arrival) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n@done bra arrived;\nbra again;\narrived:\n}" ::"r"(
            shared_address(arrival))
        : "memory");
#else
    static_cast<void>(arrival);
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
#endif
}

// The block's stage is done: seen by who waits for it.
MC_DEVICE void finish_stage(const EncodeCall& c, int stage) {
#if defined(__CUDACC__)
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("fence.acq_rel.gpu;\nst.relaxed.gpu.global.u32 [%0], %1;" ::"l"(c.flags + blockIdx.x), "r"(stage)
                     : "memory");
    }
#else
    static_cast<void>(c), static_cast<void>(stage);
#endif
}

#if defined(__CUDACC__)
constexpr bool kStagesMeet = false;
#else
constexpr bool kStagesMeet = true;
#endif

// Until `count` blocks from `base` on have done `stage`. Under emulation all blocks of the grid meet.
MC_DEVICE void wait_for_stage(const EncodeCall& c, int stage, int base, int count, int blocks) {
    if (MC_FAULT(21)) return;
#if defined(__CUDACC__)
    for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
        const int block = base + i < blocks ? base + i : base + i - blocks;
        uint32_t done;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(done) : "l"(c.flags + block) : "memory");
        } while (static_cast<int>(done) < stage);
    }
    __syncthreads();
#else
    static_cast<void>(c), static_cast<void>(stage), static_cast<void>(base), static_cast<void>(count);
    static_cast<void>(blocks);
    grid_barrier();
#endif
}

}  // namespace mc::cuda
