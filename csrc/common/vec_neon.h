// Vectors with NEON, as every 64-bit Arm has it.
//
// `Vec` is kWidth floats: load and store of a full vector or of its first n elements, for each element type, and the
// arithmetic that the primitives are written in. kManyRegisters: there are 32 of them, not 16. All of it is in an unnamed
// namespace and uses no inline function of the standard library: the linker keeps one copy of an inline function, and it
// might keep that of a level with more.
//
// greater(a, b) is a > b ? a : b, so a NaN in b stays. power_of_two(t): 2^n, or 0 for n = -127, where t = n + kRounder.
// sums(a): element i is the sum of a[i], of kWidth vectors. transpose(a): element j of a[i] and element i of a[j] change
// places.
//
// load_pair: 2 * kWidth elements in the order that costs least to load; in_order brings it back to that of memory, and
// as_loaded floats that lie in order into it.
#pragma once

#include <arm_neon.h>

#include <cstring>

namespace mc {
namespace {

struct F32 {
    static constexpr int kBytes = 4;
};
struct F16 {
    static constexpr int kBytes = 2;
};
struct BF16 {
    static constexpr int kBytes = 2;
};

// Whatever its address, which need not be a multiple of an element's size.
inline uint8x16_t load_bytes16(const char* p) { return vld1q_u8(reinterpret_cast<const uint8_t*>(p)); }
inline uint8x8_t load_bytes8(const char* p) { return vld1_u8(reinterpret_cast<const uint8_t*>(p)); }
inline void store_bytes16(char* p, uint8x16_t x) { vst1q_u8(reinterpret_cast<uint8_t*>(p), x); }
inline void store_bytes8(char* p, uint8x8_t x) { vst1_u8(reinterpret_cast<uint8_t*>(p), x); }

struct Vec {
    static constexpr int kWidth = 4;
    static constexpr bool kManyRegisters = true;
    float32x4_t v;

    static Vec all(float x) { return {vdupq_n_f32(x)}; }

    static Vec load(F32, const char* p) { return {vreinterpretq_f32_u8(load_bytes16(p))}; }
    static Vec load(F16, const char* p) { return {vcvt_f32_f16(vreinterpret_f16_u8(load_bytes8(p)))}; }
    static Vec load(BF16, const char* p) {
        return {vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(load_bytes8(p)), 16))};
    }

    static void store(F32, char* p, Vec x) { store_bytes16(p, vreinterpretq_u8_f32(x.v)); }
    static void store(F16, char* p, Vec x) { store_bytes8(p, vreinterpret_u8_f16(vcvt_f16_f32(x.v))); }
    static void store(BF16, char* p, Vec x) {
        // To nearest, ties to even, subnormals included; a NaN stays one (rounding could carry it into infinity).
        const uint32x4_t u = vreinterpretq_u32_f32(x.v), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
        const uint32x4_t sum = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
        const uint32x4_t rounded = vbslq_u32(vceqq_f32(x.v, x.v), sum, vorrq_u32(u, vdupq_n_u32(0x400000)));
        store_bytes8(p, vreinterpret_u8_u16(vshrn_n_u32(rounded, 16)));
    }

    template <class T>
    static Vec load_part(T t, const char* p, int n) {
        alignas(16) char buffer[kWidth * T::kBytes] = {};
        std::memcpy(buffer, p, static_cast<size_t>(n * T::kBytes));
        return load(t, buffer);
    }
    template <class T>
    static void store_part(T t, char* p, int n, Vec x) {
        alignas(16) char buffer[kWidth * T::kBytes];
        store(t, buffer, x);
        std::memcpy(p, buffer, static_cast<size_t>(n * T::kBytes));
    }
};

inline Vec mul(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
inline Vec fmadd(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Vec fnmadd(Vec a, Vec b, Vec c) { return {vfmsq_f32(c.v, a.v, b.v)}; }
inline Vec swap_pairs(Vec a) { return {vrev64q_f32(a.v)}; }

inline Vec add(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
inline Vec sub(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
inline Vec div(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
// Not the instruction for it, which makes a NaN of a NaN in either.
inline Vec greater(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline float first(Vec a) { return vgetq_lane_f32(a.v, 0); }
inline float sum(Vec a) { return vaddvq_f32(a.v); }
inline float greatest(Vec a) { return vmaxnmvq_f32(a.v); }
inline Vec power_of_two(Vec t) {
    const int32x4_t shifted = vshlq_n_s32(vreinterpretq_s32_f32(t.v), 23);
    return {vreinterpretq_f32_s32(vaddq_s32(shifted, vdupq_n_s32(0x3f800000)))};
}

inline Vec sums(const Vec* a) {
    return {vpaddq_f32(vpaddq_f32(a[0].v, a[1].v), vpaddq_f32(a[2].v, a[3].v))};
}

// Elements of 64 bits: neighbours of two registers that stay together.
inline float32x4_t lower_halves(float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_f64(vtrn1q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}
inline float32x4_t upper_halves(float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_f64(vtrn2q_f64(vreinterpretq_f64_f32(a), vreinterpretq_f64_f32(b)));
}
inline void transpose(Vec* a) {
    const float32x4_t even = vtrn1q_f32(a[0].v, a[1].v), odd = vtrn2q_f32(a[0].v, a[1].v);
    const float32x4_t even2 = vtrn1q_f32(a[2].v, a[3].v), odd2 = vtrn2q_f32(a[2].v, a[3].v);
    a[0].v = lower_halves(even, even2);
    a[1].v = lower_halves(odd, odd2);
    a[2].v = upper_halves(even, even2);
    a[3].v = upper_halves(odd, odd2);
}

struct Pair {
    Vec first, second;
};
template <class T>
inline Pair load_pair(T t, const char* p) {
    return {Vec::load(t, p), Vec::load(t, p + Vec::kWidth * T::kBytes)};
}
// Even elements are shifted up, odd ones are in place already: one operation a vector.
inline Pair load_pair(BF16, const char* p) {
    const uint32x4_t x = vreinterpretq_u32_u8(load_bytes16(p));
    return {{vreinterpretq_f32_u32(vshlq_n_u32(x, 16))},
            {vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000)))}};
}
template <class T>
inline Pair in_order(T, Pair x) {
    return x;
}
template <class T>
inline Pair as_loaded(T, Pair x) {
    return x;
}
inline Pair in_order(BF16, Pair x) {
    return {{vzip1q_f32(x.first.v, x.second.v)}, {vzip2q_f32(x.first.v, x.second.v)}};
}
inline Pair as_loaded(BF16, Pair x) {
    return {{vuzp1q_f32(x.first.v, x.second.v)}, {vuzp2q_f32(x.first.v, x.second.v)}};
}

}  // namespace
}  // namespace mc
