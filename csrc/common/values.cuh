// Elements widened to fp32, and sums over a warp.
#pragma once

#include "device_types.cuh"

namespace mc::cuda {

constexpr int kWarp = 32;

// Element i of a row of `dtype` (MC_F32, ...), which no kernel writes.
MC_DEVICE float weight_at(const char* p, int dtype, int64_t i) {
    if (dtype == 0) return Float::widen(read_constant<uint32_t>(p + 4 * i));
    const uint16_t bits = read_constant<uint16_t>(p + 2 * i);
    return dtype == 1 ? Half::widen(bits) : Bfloat::widen(bits);
}

template <class E, int V>
MC_DEVICE void widen(const Pack<typename E::Bits, V>& p, float (&out)[V]) {
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = E::widen(p.x[i]);
}

MC_DEVICE float warp_sum(float x) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

MC_DEVICE float warp_max(float x) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    return x;
}

}  // namespace mc::cuda
