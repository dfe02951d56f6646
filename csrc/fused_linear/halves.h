// Where a level's sums of products are two of 16 bits a row, see packed_impl.h.
#pragma once

#include <cstdint>

#include "packed.h"

namespace mc {
namespace {

// Bytes 0 and 1 of every four meet in the lower sum, 2 and 3 in the upper. -8 by 16 of them is at least -16,384.
inline int32_t start_of_halves(const int8_t* x) {
    int32_t low = 0, high = 0;
    for (int i = 0; i < kPackedBlock; i += 4) {
        low += x[i] + x[i + 1];
        high += x[i + 2] + x[i + 3];
    }
    const uint32_t both = static_cast<uint16_t>(-8 * low) | static_cast<uint32_t>(static_cast<uint16_t>(-8 * high)) << 16;
    return static_cast<int32_t>(both);
}

}  // namespace
}  // namespace mc
