// Counts and places among the threads of one block.
#pragma once

#include "values.cuh"

namespace mc::cuda {

constexpr int kMostWarps = 32;

// x, but at least `least` and then at most `most`.
MC_DEVICE int64_t between(int64_t least, int64_t x, int64_t most) {
    const int64_t y = x < least ? least : x;
    return y < most ? y : most;
}

// What the warps tell each other. A round writes one half and reads it after the barrier; by the barrier of the round
// after that, all have read it: one barrier a round. Blocks are of whole warps, or of less than one.
struct Rounds {
    Span<uint32_t> parts;  // [2, kMostWarps]
    int round = 0;

    // Lane w of every warp gets what warp w has to say; 0 where there is no such warp.
    MC_DEVICE uint32_t exchange(uint32_t mine) {
        const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
        const Span<uint32_t> half = parts.part((round++ & 1) * kMostWarps, kMostWarps);
        if (lane == 0) half[thread / kWarp] = mine;
        __syncthreads();
        return lane * kWarp < static_cast<int>(blockDim.x) ? half[lane] : 0;
    }
};

// The sum over all threads of the block.
MC_DEVICE int block_sum(Rounds& rounds, int x) {
    const auto sum = [](int y) {
#pragma unroll
        for (int lanes = kWarp / 2; lanes; lanes /= 2) y += __shfl_xor_sync(0xffffffffu, y, lanes);
        return y;
    };
    return sum(static_cast<int>(rounds.exchange(static_cast<uint32_t>(sum(x)))));
}

struct Three {
    int a, b, c;

    MC_DEVICE Three operator+(const Three& x) const { return {a + x.a, b + x.b, c + x.c}; }
};

// How many of the threads before this one have a flag, for three flags of which a thread has at most two, at most every
// other one the third. `all` grows by how many of the block have it. Counts travel side by side in 11, 11 and 10 bits.
MC_DEVICE Three count_before(Rounds& rounds, bool a, bool b, bool c, Three& all) {
    const auto unpack = [](uint32_t x) {
        return Three{static_cast<int>(x & 0x7ff), static_cast<int>(x >> 11 & 0x7ff), static_cast<int>(x >> 22)};
    };
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
    const unsigned x = __ballot_sync(0xffffffffu, a), y = __ballot_sync(0xffffffffu, b);
    const unsigned z = __ballot_sync(0xffffffffu, c);
    const auto pack = [&](unsigned lanes) {
        return static_cast<uint32_t>(__popc(x & lanes)) | static_cast<uint32_t>(__popc(y & lanes)) << 11 |
               static_cast<uint32_t>(__popc(z & lanes)) << 22;
    };
    uint32_t sums = rounds.exchange(pack(0xffffffffu));  // becomes that of the warps up to this lane's
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
        const uint32_t earlier = __shfl_sync(0xffffffffu, sums, lane - step);
        sums += lane >= step ? earlier : 0;
    }
    const int warps = (static_cast<int>(blockDim.x) + kWarp - 1) / kWarp;
    const uint32_t below = __shfl_sync(0xffffffffu, sums, warp - 1), total = __shfl_sync(0xffffffffu, sums, warps - 1);
    const Three before = all + unpack((warp > 0 ? below : 0) + pack((1u << lane) - 1));
    all = all + unpack(total);
    return before;
}

}  // namespace mc::cuda
