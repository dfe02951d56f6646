// Phases of a rotary embedding in fixed point: band b advances by step[b] = inv_freq[b] / 2 pi turns, in 64 bits modulo
// one turn, so that position * step drops whole turns where it overflows. The only error is step's, below 2^-55 turns:
// at a position of 1e7 it is 2^-31 turns.
#pragma once

#include "device.cuh"

namespace mc::cuda {

MC_DEVICE uint64_t step_of(double inv_freq) {
    constexpr double kTurn = 0.15915494309189533577, kWhole = 18446744073709551616.0;
    double turns = inv_freq * kTurn;
    turns -= rint(turns);
    return static_cast<uint64_t>(static_cast<int64_t>(turns * kWhole));
}

// In 2^-32 turns.
MC_DEVICE uint32_t turn_of(int64_t position, uint64_t step) {
    return static_cast<uint32_t>(static_cast<uint64_t>(position) * step >> 32);
}

// To an fp32 rounding: polynomials on half a turn (the library's sine would bring a path for huge angles, with a table on
// the stack).
MC_DEVICE void cos_sin(uint32_t turn, float& cos, float& sin) {
    const uint32_t half_turn = turn << 1;  // the angle modulo half a turn, in 2^-31 quarter turns
    const float x = static_cast<float>(static_cast<int32_t>(half_turn)) * 4.656612873077393e-10f, z = x * x;
    const float s = x * (1.570796251296997f +
                         z * (-0.6459633708000183f +
                              z * (0.07968848198652267f + z * (-0.004672227893024683f + z * 0.00015082054596859962f))));
    const float k =
        1.0f + z * (-1.2337005138397217f +
                    z * (0.2536693513393402f +
                         z * (-0.020862750709056854f + z * (0.0009177887695841491f + z * -2.384833715041168e-05f))));
    const bool opposite = ((turn ^ half_turn) & 0x80000000u) != 0;  // further than a quarter turn from 0
    cos = opposite ? -k : k;
    sin = opposite ? -s : s;
}

// To 2^-20, by the special function unit: for what is rounded to 16 bits.
MC_DEVICE void cos_sin_16(uint32_t turn, float& cos, float& sin) {
    const float angle = static_cast<float>(static_cast<int32_t>(turn)) * 1.4629180792671596e-09f;  // 2 pi / 2^32
    cos = __cosf(angle);
    sin = __sinf(angle);
}

}  // namespace mc::cuda
