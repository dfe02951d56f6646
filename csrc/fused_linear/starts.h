// What sums of products begin with, see `Products` in packed_impl.h: -h (sum of a block's bytes of x).
#pragma once

#include <cstdint>

#include "packed.h"

namespace mc {
namespace {

// For levels that have one sum of 32 bits a row.
inline int32_t start_of_sum(const int8_t* x, int bits) {
    int32_t sum = 0;
    for (int i = 0; i < kPackedBlock; ++i) sum += x[i];
    return -(1 << (bits - 1)) * sum;
}

// For those that have two of 16 bits, and codes of 4: bytes 0 and 1 of every four meet in the lower sum, 2 and 3 in the
// upper. -8 by 16 of them is at least -16,384.
inline int32_t start_of_halves(const int8_t* x) {
    int32_t low = 0, high = 0;
    for (int i = 0; i < kPackedBlock; i += 4) {
        low += x[i] + x[i + 1];
        high += x[i + 2] + x[i + 3];
    }
    const auto first = static_cast<uint16_t>(-8 * low), second = static_cast<uint16_t>(-8 * high);
    return static_cast<int32_t>(first | static_cast<uint32_t>(second) << 16);
}

}  // namespace
}  // namespace mc
