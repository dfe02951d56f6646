// A warp's tile of slots: their positions, and their keys and values on the way into the operands' registers. Which lane
// has what of them: attend_tensor.cuh.
#pragma once

#include "call.cuh"

namespace mc::cuda {

constexpr int kTileSlots = 16;

// Positions of slots g and g + 8 of a tile.
struct Slots {
    int64_t at[2];

    MC_DEVICE Slots(const AttendCall& c, const Part& p, int first) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int s = first + 8 * i;
            const int64_t index = static_cast<int64_t>(p.b) * c.slots + s;
            at[i] = s < p.high ? read_constant<int64_t>(c.kv_pos + index) : -1;
        }
    }
    MC_DEVICE bool seen(int i, int64_t latest) const { return at[i] >= 0 && at[i] <= latest; }
};

// Of slots g and g + 8 of a tile: what an array has for them, or 0.
struct Extras {
    float x[2];

    MC_DEVICE Extras(const AttendCall& c, const Part& p, const float* array, int first) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int s = first + 8 * i;
            x[i] = array && s < p.high ? read_constant<float>(array + static_cast<int64_t>(p.b) * c.slots + s) : 0.0f;
        }
    }
};

// Of slots g and g + 8 of a tile, those that are wanted; 0 in the place of others. L: a piece as it is loaded.
template <int D, class L>
MC_DEVICE void load_keys(const AttendCall& c, const char* keys, const bool (&wanted)[2], int first, int piece,
                         L (&to)[2][D / 32]) {
    constexpr int kPiece = sizeof(L);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const char* row = keys + (first + 8 * i + (MC_FAULT(11) ? 1 : 0)) * c.k_step[2] + kPiece * piece;
#pragma unroll
        for (int j = 0; j < D / 32; ++j) {
            to[i][j] = wanted[i] ? read_constant<L>(row + 4 * kPiece * j) : L{};
        }
    }
}

// seen: bit 4 s of word i for slot s + 8 i.
template <int D, class L>
MC_DEVICE void load_values(const AttendCall& c, const char* values, const unsigned (&seen)[2], int tile, int lane,
                           L (&to)[4][D / 64]) {
    constexpr int kPiece = sizeof(L);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int s = 2 * (lane % 4) + i % 2;
        const char* row = values + (tile + s + i / 2 * 8) * c.v_step[2] + kPiece * (lane / 4);
        const bool wanted = (seen[i / 2] >> 4 * s & 1) != 0;
#pragma unroll
        for (int j = 0; j < D / 64; ++j) to[i][j] = wanted ? read_constant<L>(row + 8 * kPiece * j) : L{};
    }
}

}  // namespace mc::cuda
