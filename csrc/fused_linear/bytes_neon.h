// Bytes with NEON, see packed_impl.h: with the dot products that most 64-bit Arm processors have (mixed signs beside
// products of bf16), or without. Included after vec_neon.h.
#pragma once

#include "starts.h"

namespace mc {
namespace {

using Bytes = uint8x16_t;

inline Bytes load_bytes(const char* p) { return load_bytes16(p); }
inline Bytes lower(Bytes b) { return vandq_u8(b, vdupq_n_u8(15)); }
inline Bytes upper(Bytes b) { return vshrq_n_u8(b, 4); }
// Shifts that keep the bits of the other number which they do not reach.
inline Bytes lower_bytes(Bytes b, Bytes c) { return vsliq_n_u8(b, c, 4); }
inline Bytes upper_bytes(Bytes b, Bytes c) { return vsriq_n_u8(c, b, 4); }

inline int8x16_t four_in_all(int32_t x) { return vreinterpretq_s8_s32(vdupq_n_s32(x)); }

#if defined(__ARM_FEATURE_DOTPROD)

#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool kWholeBytes = true;
constexpr int64_t kFourBitRows = 8, kEightBitRows = 8;
inline int32x4_t dot_bytes(int32x4_t sum, Bytes codes, int8x16_t x) { return vusdotq_s32(sum, codes, x); }
#else
constexpr bool kWholeBytes = false;  // codes are taken for signed bytes
constexpr int64_t kFourBitRows = 8, kEightBitRows = 4;
inline int32x4_t dot_bytes(int32x4_t sum, Bytes codes, int8x16_t x) {
    return vdotq_s32(sum, vreinterpretq_s8_u8(codes), x);
}
#endif

struct Products {
    int32x4_t v;

    static Products all(int32_t start) { return {vdupq_n_s32(start)}; }
    static int32_t start(const int8_t* x, int bits) { return start_of_sum(x, kWholeBytes ? bits : 4); }
    Products add(Bytes codes, int32_t x) const { return {dot_bytes(v, codes, four_in_all(x))}; }
    static Vec value(Products high, Products low) {
        return {vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(high.v, 8), low.v))};
    }
};

#else

constexpr bool kWholeBytes = false;  // codes are taken for signed bytes
constexpr int64_t kFourBitRows = 3, kEightBitRows = 1;

// Four sums a row, of 16 bits: of 8 products each, at most 8 * 15 * 128 = 15,360, and centred 16,384.
struct Products {
    int16x8_t lower, upper;  // two rows each

    static Products all(int32_t start) {
        const int16x8_t two = vreinterpretq_s16_u64(vdupq_n_u64(static_cast<uint32_t>(start)));
        return {two, two};
    }
    static int32_t start(const int8_t* x, int) { return start_of_halves(x); }
    Products add(Bytes codes, int32_t x) const {
        const int8x16_t by = four_in_all(x), c = vreinterpretq_s8_u8(codes);
        return {vmlal_s8(lower, vget_low_s8(c), vget_low_s8(by)), vmlal_high_s8(upper, c, by)};
    }
    int32x4_t sum() const { return vpaddq_s32(vpaddlq_s16(lower), vpaddlq_s16(upper)); }
    static Vec value(Products high, Products low) {
        return {vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(high.sum(), 8), low.sum()))};
    }
};

#endif

}  // namespace
}  // namespace mc
