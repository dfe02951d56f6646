// context_attention on a GPU: attention to the slots of a cache, keys turned while they are read. Contract: mc_kernels.h.
// Forward only. cuda.cu chooses and launches:
//
//   attend_tensor   8 or 16 rows (queries of the heads of a group) to a range of slots on tensor cores
//   attend_plain    4 rows, any head and layout, and fp32
//   join_splits     a row's ranges of slots, in their order
//   sum_mass        what a slot receives, over rows in their order: from logits that the first launch has stored
//
// Everything is deterministic. Nothing but registers and partial results: workspace is splits * B Hq T (D + 2) floats, with
// mass B Hq T (S + 2) more.
//
// Floor: bytes over bandwidth. A decode step of Llama-3-8B in bf16 at 32k slots reads 134 MB a layer: 40 us at 3.35 TB/s
// (H100), 28 us at 4.8 TB/s (H200). Slots are split so that blocks fill the device in one wave. A warp has its tile's
// values and the next one's keys on their way together, 8 KB at D = 128, from the product with the keys to that with the
// values, straight into the operands' registers; three blocks of four warps are up to 96 KB a multiprocessor, where
// Little's law asks 25 (H100) to 36 KB (H200) for 1 us of latency. So there is no stage in shared memory, and no
// asynchronous copy into one. Of a short context the ends count (10 us of 22 at 8k slots, H200): a block has all that it
// begins with on its way together, its first keys with its queries, one latency of DRAM and not four; and join_splits asks
// for all of a row before it waits: a split after the other it took 12 us of 36 at 8k slots (H100).
//
// Rotation: an entry's bytes of one KV head take 35 (H100) or 25 (H200) cycles of a multiprocessor to arrive at D = 128. Of
// its 64 pairs each costs some 9 instructions for the phase (3 of them integer products, 2 of the special function unit)
// and 8 for turning and rounding it: 9 cycles to issue, 8 of the special function unit beside them. Products and softmax
// are 3 more. They hide behind the memory.
//
// More rows than a tile's (16; plain 4) are as many passes over the same slots, by blocks that run side by side, so that
// only the first reads from DRAM; each pass turns the keys again. It is meant for up to 64 rows. A prefill of 512 queries
// would take 128 passes in the place of the 16 of Triton's kernel, whose tiles are 128 rows and which turns keys once: an
// order of magnitude slower, and the Python side leaves it to Triton.
//
// An fp8 cache halves the bytes: of 32k slots 67 MB a layer, 20 us on an H100, 14 us on an H200. Its elements become 16-bit
// ones, exactly, when a tile's turn comes. Till then they wait in registers as bytes, 4 KB a warp at D = 128: 48 KB a
// multiprocessor are on their way, which is still enough. A pair of elements is 2 instructions more (5 for bf16, by way of
// fp16): 2 to 5 cycles an entry beside the 12 above, where 256 bytes take 17 (H100) or 12 (H200). So on an H200 the
// instructions are the bound. Scales are one product a logit and one a result. Rows beyond 8 are passes of 8.
//
// Plain: products in fp32 from shared memory, some 16 of its cycles an entry at D = 128 in the 49 (H200) that 1 KB takes;
// for 16-bit heads of other widths, where 512 bytes arrive in 25, it is the slower of the two bounds.
#pragma once

#include "attend_plain.cuh"
#include "attend_tensor.cuh"
#include "values.cuh"

namespace mc::cuda {

constexpr int kJoinThreads = 256, kMassThreads = 128, kMostSplits = 128;

inline int64_t join_shared_bytes(int threads, int64_t splits, int64_t dims) {
    return shared_bytes_of<float>(threads / 32 * splits) + shared_bytes_of<float>(threads / 32 * dims);
}

// Row blockIdx.x of [B, Hq, T]. No splits: nothing is seen. A warp has every eighth split, a lane every 32nd dimension,
// and of 64 splits and 128 dimensions all is asked for before anything is awaited: one latency of L2 and not one a split.
template <class E>
__global__ void __launch_bounds__(kJoinThreads) join_splits(const __grid_constant__ AttendCall c) {
    MC_SHARED_MEMORY(memory);
    SharedMemory shared(memory);
    constexpr int kSplitsEach = 8, kDimsEach = 4;
    const int warps = static_cast<int>(blockDim.x) / 32, warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const Span<float> weights = shared.take<float>(warps * c.splits).part(warp * c.splits, c.splits);  // of each warp
    const Span<float> sums = shared.take<float>(warps * c.dims);
    const int64_t row = static_cast<int64_t>(blockIdx.x);
    float parts[kSplitsEach][kDimsEach];
    const auto load = [&](int s, int first) {
        const float* at = c.partial_out + (s * c.all_rows + row) * c.dims + first + lane;
#pragma unroll
        for (int j = 0; j < kSplitsEach; ++j, s += warps, at += warps * c.all_rows * c.dims) {
#pragma unroll
            for (int i = 0; i < kDimsEach; ++i) {
                parts[j][i] = s < c.splits && first + lane + 32 * i < c.dims ? read<float>(at + 32 * i) : 0.0f;
            }
        }
    };
    load(warp, 0);
    float tops[kMostSplits / 32], totals[kMostSplits / 32], top = -MC_INFINITY, total = 0.0f;
#pragma unroll
    for (int j = 0; j < kMostSplits / 32; ++j) {
        const int s = lane + 32 * j;
        tops[j] = s < c.splits ? read<float>(c.tops + s * c.all_rows + row) : -MC_INFINITY;
        totals[j] = s < c.splits ? read<float>(c.totals + s * c.all_rows + row) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kMostSplits / 32; ++j) top = max(top, tops[j]);
    top = warp_max(top);
#pragma unroll
    for (int j = 0; j < kMostSplits / 32; ++j) {
        const float weight = share(tops[j], top) * totals[j];
        if (lane + 32 * j < c.splits) weights[lane + 32 * j] = weight;
        total += weight;
    }
    total = warp_sum(total);
    __syncwarp();
    for (int first = 0; first < c.dims; first += 32 * kDimsEach) {
        float sum[kDimsEach] = {};
        for (int s = warp; s < c.splits; s += warps * kSplitsEach) {
            if (first > 0 || s > warp) load(s, first);
#pragma unroll
            for (int j = 0; j < kSplitsEach; ++j) {
                const float weight = s + j * warps < c.splits ? weights[s + j * warps] : 0.0f;
#pragma unroll
                for (int i = 0; i < kDimsEach; ++i) sum[i] += weight * parts[j][i];
            }
        }
#pragma unroll
        for (int i = 0; i < kDimsEach; ++i) {
            const int d = first + lane + 32 * i;
            if (d < c.dims) sums[warp * c.dims + d] = sum[i];
        }
    }
    __syncthreads();
    const int64_t t = row % c.queries, h = row / c.queries % c.heads, b = row / c.queries / c.heads;
    char* to = c.out + b * c.out_step[0] + h * c.out_step[1] + t * c.out_step[2];
    for (int d = static_cast<int>(threadIdx.x); d < c.dims; d += static_cast<int>(blockDim.x)) {
        float sum = 0.0f;
        for (int w = 0; w < warps; ++w) sum += sums[w * c.dims + d];
        write(to + d * sizeof(typename E::Bits), E::narrow(total > 0.0f ? sum / total : 0.0f));
    }
    if (threadIdx.x != 0) return;
    write(c.lse + row, lse_of(top, total));
    if (!c.row_top) return;
    write(c.row_top + row, top);
    write(c.row_total + row, total);
}

// A thread a slot of [B, S].
static __global__ void __launch_bounds__(kMassThreads) sum_mass(const __grid_constant__ AttendCall c) {
    const int64_t slot = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (slot >= static_cast<int64_t>(c.batch) * c.slots) return;
    const int64_t b = slot / c.slots, s = slot % c.slots;
    const int rows = c.heads * c.queries;
    float sum = 0.0f;
#pragma unroll 8
    for (int r = 0; r < rows; ++r) {
        const int64_t row = b * rows + r;
        const float x = share(read<float>(c.logits + row * c.slots + s), read<float>(c.row_top + row));
        sum += x / max(read<float>(c.row_total + row), 1.0f);  // below 1: nothing is seen
    }
    write(c.mass + slot, sum);
}

}  // namespace mc::cuda
