// Vectors in portable C++: an array, and the compiler may use whatever every such processor has.
//
// `Vec` is kWidth floats: load and store of a full vector or of its first n elements, for each element type, and the
// arithmetic that the primitives are written in. kManyRegisters: there are 32 of them, not 16. All of it is in an unnamed
// namespace and uses no inline function of the standard library: the linker keeps one copy of an inline function, and it
// might keep the AVX-512 one.
//
// greater(a, b) is a > b ? a : b, so a NaN in b stays. power_of_two(t): 2^n, or 0 for n = -127, where t = n + kRounder.
// sums(a): element i is the sum of a[i], of kWidth vectors. transpose(a): element j of a[i] and element i of a[j] change
// places.
//
// load_pair: 2 * kWidth elements in the order that costs least to load; in_order brings it back to that of memory, and
// as_loaded floats that lie in order into it.
#pragma once

#include <cstdint>
#include <cstring>

#include "bits.h"

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

inline float decode(F32, uint32_t u) { return as_float(u); }
inline float decode(BF16, uint16_t u) { return as_float(static_cast<uint32_t>(u) << 16); }

inline float decode(F16, uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, magnitude = h & 0x7fff;
    if (magnitude >= 0x7c00) return as_float(sign | 0x7f800000 | (magnitude << 13));  // infinity, NaN
    // Read as an fp32 whose exponent is too small by 112; the multiplication also normalises subnormals.
    return as_float(sign | as_bits(as_float(magnitude << 13) * 0x1p112f));
}

inline uint32_t encode(F32, float f) { return as_bits(f); }

inline uint16_t encode(BF16, float f) {
    const uint32_t u = as_bits(f);
    if (f != f) return static_cast<uint16_t>((u >> 16) | 0x40);  // rounding could carry a NaN into infinity
    return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline uint16_t encode(F16, float f) {
    const uint32_t u = as_bits(f), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more round to infinity
    if (magnitude < 0x38800000) {
        // Subnormal: adding 0.5 shifts the mantissa so that the fp32 addition rounds at fp16's last place.
        return static_cast<uint16_t>(sign | (as_bits(as_float(magnitude) + 0.5f) - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

template <class T>
struct Stored {
    using type = uint16_t;
};
template <>
struct Stored<F32> {
    using type = uint32_t;
};

struct Vec {
    static constexpr int kWidth = 8;
    static constexpr bool kManyRegisters = false;
    float v[kWidth];

    static Vec all(float x) {
        Vec out;
        for (float& f : out.v) f = x;
        return out;
    }

    template <class T>
    static Vec load_part(T, const char* p, int n) {
        typename Stored<T>::type raw[kWidth] = {};
        std::memcpy(raw, p, static_cast<size_t>(n * T::kBytes));
        Vec out;
        for (int i = 0; i < kWidth; ++i) out.v[i] = decode(T{}, raw[i]);
        return out;
    }

    template <class T>
    static void store_part(T, char* p, int n, const Vec& x) {
        typename Stored<T>::type raw[kWidth];
        for (int i = 0; i < kWidth; ++i) raw[i] = encode(T{}, x.v[i]);
        std::memcpy(p, raw, static_cast<size_t>(n * T::kBytes));
    }

    template <class T>
    static Vec load(T t, const char* p) {
        return load_part(t, p, kWidth);
    }
    template <class T>
    static void store(T t, char* p, const Vec& x) {
        store_part(t, p, kWidth, x);
    }
};

inline Vec mul(const Vec& a, const Vec& b) {
    Vec out;
    for (int i = 0; i < Vec::kWidth; ++i) out.v[i] = a.v[i] * b.v[i];
    return out;
}

inline Vec fmadd(const Vec& a, const Vec& b, const Vec& c) {
    Vec out;
    for (int i = 0; i < Vec::kWidth; ++i) out.v[i] = a.v[i] * b.v[i] + c.v[i];
    return out;
}

inline Vec fnmadd(const Vec& a, const Vec& b, const Vec& c) {
    Vec out;
    for (int i = 0; i < Vec::kWidth; ++i) out.v[i] = c.v[i] - a.v[i] * b.v[i];
    return out;
}

inline Vec swap_pairs(const Vec& a) {
    Vec out;
    for (int i = 0; i < Vec::kWidth; ++i) out.v[i] = a.v[i ^ 1];
    return out;
}

inline Vec add(const Vec& a, const Vec& b) {
    Vec out;
    for (int i = 0; i < Vec::kWidth; ++i) out.v[i] = a.v[i] + b.v[i];
    return out;
}

inline Vec sub(const Vec& a, const Vec& b) {
    Vec out;
    for (int i = 0; i < Vec::kWidth; ++i) out.v[i] = a.v[i] - b.v[i];
    return out;
}

inline Vec div(const Vec& a, const Vec& b) {
    Vec out;
    for (int i = 0; i < Vec::kWidth; ++i) out.v[i] = a.v[i] / b.v[i];
    return out;
}

inline Vec greater(const Vec& a, const Vec& b) {
    Vec out;
    for (int i = 0; i < Vec::kWidth; ++i) out.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return out;
}

inline float first(const Vec& a) { return a.v[0]; }

inline float sum(const Vec& a) {
    float out = 0.0f;
    for (float x : a.v) out += x;
    return out;
}

inline float greatest(const Vec& a) {
    float out = a.v[0];
    for (float x : a.v) out = out > x ? out : x;
    return out;
}

inline Vec power_of_two(const Vec& t) {
    Vec out;
    for (int i = 0; i < Vec::kWidth; ++i) out.v[i] = as_float((as_bits(t.v[i]) << 23) + 0x3f800000);
    return out;
}

inline Vec sums(const Vec* a) {
    Vec out;
    for (int i = 0; i < Vec::kWidth; ++i) out.v[i] = sum(a[i]);
    return out;
}

inline void transpose(Vec* a) {
    for (int i = 0; i < Vec::kWidth; ++i) {
        for (int j = 0; j < i; ++j) {
            const float x = a[i].v[j];
            a[i].v[j] = a[j].v[i];
            a[j].v[i] = x;
        }
    }
}

struct Pair {
    Vec first, second;
};
template <class T>
inline Pair load_pair(T t, const char* p) {
    return {Vec::load(t, p), Vec::load(t, p + Vec::kWidth * T::kBytes)};
}
template <class T>
inline Pair in_order(T, const Pair& x) {
    return x;
}
template <class T>
inline Pair as_loaded(T, const Pair& x) {
    return x;
}

}  // namespace
}  // namespace mc
