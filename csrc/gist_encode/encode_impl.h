// The primitives of gist_encode, written once over a vector type and compiled once per instruction set.
//
// Included by encode_<level>.cpp after vec_<level>.h; for what may be used here see there.
#pragma once

#include "encode.h"
#include "vec_math.h"

namespace mc {
namespace {

constexpr float kRmsEps = 1e-12f;

// body(i, count, whole) for the vectors of [0, n): whole is a constant, false for a last one of count elements.
struct Whole {
    static constexpr bool value = true;
};
struct Part {
    static constexpr bool value = false;
};
template <class Body>
inline void each_vector(int64_t n, const Body& body) {
    int64_t i = 0;
    for (; i + Vec::kWidth <= n; i += Vec::kWidth) body(i, Vec::kWidth, Whole{});
    if (i < n) body(i, static_cast<int>(n - i), Part{});
}

template <class T, class Kind>
inline Vec get(const char* p, int64_t i, int count, Kind) {
    if constexpr (Kind::value) return Vec::load(T{}, p + i * T::kBytes);
    return Vec::load_part(T{}, p + i * T::kBytes, count);
}
template <class Kind>
inline Vec get(const float* p, int64_t i, int count, Kind kind) {
    return get<F32>(reinterpret_cast<const char*>(p), i, count, kind);
}
template <class T, class Kind>
inline void put(char* p, int64_t i, int count, Kind, Vec x) {
    if constexpr (Kind::value) {
        Vec::store(T{}, p + i * T::kBytes, x);
    } else {
        Vec::store_part(T{}, p + i * T::kBytes, count, x);
    }
}
template <class Kind>
inline void put(float* p, int64_t i, int count, Kind kind, Vec x) {
    put<F32>(reinterpret_cast<char*>(p), i, count, kind, x);
}

template <class X, class Out>
void normalise(const Normalise& a) {
    Vec squares = Vec::all(0.0f);
    each_vector(a.n, [&](int64_t i, int count, auto kind) {
        const Vec x = get<X>(a.x, i, count, kind);
        squares = fmadd(x, x, squares);
        if (!a.sum) return;
        const Vec before = get(a.sum, i, count, kind), more = sub(x, get(a.lost, i, count, kind));
        const Vec after = add(before, more);
        put(a.sum, i, count, kind, after);
        put(a.lost, i, count, kind, sub(sub(after, before), more));
    });
    const float mean = sum(squares) / static_cast<float>(a.n);
    const Vec by = Vec::all(a.scale / __builtin_sqrtf(mean + kRmsEps));
    each_vector(a.n, [&](int64_t i, int count, auto kind) {
        Vec y = mul(get<X>(a.x, i, count, kind), by);
        if (a.gain) y = mul(y, get(a.gain, i, count, kind));
        put<Out>(a.out, i, count, kind, y);
    });
    const int64_t rest = a.padded - a.n;
    if (rest > 0) __builtin_memset(a.out + a.n * Out::kBytes, 0, static_cast<size_t>(rest * Out::kBytes));
}

// 2^(scale (x - max x)) in place; returns their sum. A NaN makes all of them NaN.
inline float exponentials(float* x, int64_t n, float scale) {
    float top = x[0];
    for (int64_t i = 1; i < n; ++i) top = x[i] > top ? x[i] : top;
    Vec total = Vec::all(0.0f);
    float rest = 0.0f;
    each_vector(n, [&](int64_t i, int count, auto kind) {
        const Vec y = exp2(mul(sub(get(x, i, count, kind), Vec::all(top)), Vec::all(scale)));
        put(x, i, count, kind, y);
        if constexpr (decltype(kind)::value) {
            total = add(total, y);
        } else {
            for (int64_t j = i; j < n; ++j) rest += x[j];
        }
    });
    return sum(total) + rest;
}

inline void scale_all(float* x, int64_t n, float by) {
    each_vector(
        n, [&](int64_t i, int count, auto kind) { put(x, i, count, kind, mul(get(x, i, count, kind), Vec::all(by))); });
}

void softmax(float* x, int64_t n, float scale) {
    const float total = exponentials(x, n, scale * kLog2E);
    scale_all(x, n, 1.0f / total);
}

inline float dot(const float* x, const float* y, int64_t n) {
    Vec total = Vec::all(0.0f);
    each_vector(n, [&](int64_t i, int count, auto kind) {
        total = fmadd(get(x, i, count, kind), get(y, i, count, kind), total);
    });
    return sum(total);
}

void pool(const PoolRows& a) {
    for (int64_t j = 0; j < a.rows; ++j) {
        a.p[j] = a.query ? dot(a.query, a.s + j * a.step, a.width) : 1.0f / static_cast<float>(a.rows);
    }
    if (a.query) softmax(a.p, a.rows, a.scale);
    each_vector(a.width, [&](int64_t i, int count, auto kind) {
        Vec total = Vec::all(0.0f);
        for (int64_t j = 0; j < a.rows; ++j) {
            total = fmadd(Vec::all(a.p[j]), get(a.s + j * a.step, i, count, kind), total);
        }
        put(a.out, i, count, kind, total);
    });
}

// silu(g) = g / (1 + 2^(-g log2 e)); below -87 the denominator stays finite, and what is left is zero to fp32.
template <class Out>
void gated(const float* gate, const float* up, int64_t n, char* out) {
    each_vector(n, [&](int64_t i, int count, auto kind) {
        const Vec g = get(gate, i, count, kind), u = get(up, i, count, kind);
        const Vec e = exp2(sub(Vec::all(0.0f), greater(Vec::all(-126.0f), mul(g, Vec::all(kLog2E)))));
        put<Out>(out, i, count, kind, mul(div(g, add(Vec::all(1.0f), e)), u));
    });
}

template <class Out>
void store_row(const float* x, int64_t n, char* out) {
    each_vector(n, [&](int64_t i, int count, auto kind) { put<Out>(out, i, count, kind, get(x, i, count, kind)); });
}

EncodeOps encode_table(const char* name) {
    return {name,
            {{normalise<F32, F32>, normalise<F32, F16>, normalise<F32, BF16>},
             {normalise<F16, F32>, nullptr, normalise<F16, BF16>},
             {normalise<BF16, F32>, nullptr, normalise<BF16, BF16>}},
            softmax,
            pool,
            {gated<F32>, nullptr, gated<BF16>},
            {store_row<F32>, nullptr, store_row<BF16>}};
}

}  // namespace
}  // namespace mc
