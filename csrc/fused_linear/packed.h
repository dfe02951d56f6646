// The layout of a packed weight, see mc_packed_weight.
#pragma once

#include <cstdint>

namespace mc {
namespace {

constexpr int64_t kPackedBlock = 32;        // elements of a row that share a scale
constexpr int64_t kPackedRows = 16;         // rows that lie together
constexpr int64_t kPackedBits = 256;        // bytes of four bits of one block of these rows

constexpr int64_t kPlaneBytes = kPackedBlock + 4;  // of one block of x: a byte of each element, and BytesOfRow's start

// Of one block of these rows: codes, scales, offsets.
inline int64_t packed_block_bytes(int bits) { return bits / 4 * kPackedBits + kPackedRows * 8; }

}  // namespace
}  // namespace mc
