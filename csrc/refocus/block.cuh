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
// after that, all have read it: one barrier a round.
struct Rounds {
    Span<uint64_t> parts;  // [2, kMostWarps]
    int round = 0;

    MC_DEVICE Span<uint64_t> next() { return parts.part((round++ & 1) * kMostWarps, kMostWarps); }
};

MC_DEVICE int warps_of_block() { return (static_cast<int>(blockDim.x) + kWarp - 1) / kWarp; }

// The sum over all threads of the block.
MC_DEVICE int block_sum(Rounds& rounds, int x) {
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
    for (int lanes = kWarp / 2; lanes; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    const Span<uint64_t> parts = rounds.next();
    if (thread % kWarp == 0) parts[thread / kWarp] = static_cast<uint64_t>(x);
    __syncthreads();
    int sum = 0;
    for (int w = 0; w < warps_of_block(); ++w) sum += static_cast<int>(parts[w]);
    return sum;
}

// Three counts at once, of at most kMostWarps * kWarp each.
struct Three {
    int a, b, c;

    MC_DEVICE Three operator+(const Three& x) const { return {a + x.a, b + x.b, c + x.c}; }
};

// How many of the threads before this one have a flag, for three flags. `all` grows by how many of the block have it.
MC_DEVICE Three count_before(Rounds& rounds, bool a, bool b, bool c, Three& all) {
    constexpr int kBits = 16;
    const auto pack = [](unsigned x, unsigned y, unsigned z) {
        return static_cast<uint64_t>(__popc(x)) | static_cast<uint64_t>(__popc(y)) << kBits |
               static_cast<uint64_t>(__popc(z)) << 2 * kBits;
    };
    const auto unpack = [](uint64_t x) {
        constexpr uint64_t kMask = (1u << kBits) - 1;
        return Three{static_cast<int>(x & kMask), static_cast<int>(x >> kBits & kMask),
                     static_cast<int>(x >> 2 * kBits & kMask)};
    };
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
    const unsigned x = __ballot_sync(0xffffffffu, a), y = __ballot_sync(0xffffffffu, b);
    const unsigned z = __ballot_sync(0xffffffffu, c), earlier = (1u << lane) - 1;
    const Span<uint64_t> parts = rounds.next();
    if (lane == 0) parts[warp] = pack(x, y, z);
    __syncthreads();
    uint64_t below = 0, total = 0;
    for (int w = 0; w < warps_of_block(); ++w) {
        const uint64_t part = parts[w];
        below += w < warp ? part : 0;
        total += part;
    }
    const Three before = all + unpack(below + pack(x & earlier, y & earlier, z & earlier));
    all = all + unpack(total);
    return before;
}

}  // namespace mc::cuda
