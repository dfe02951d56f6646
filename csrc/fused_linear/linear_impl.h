// The primitives of fused_linear, written once over a vector type and compiled once per instruction set.
//
// Included by linear_<level>.cpp after vec_<level>.h and that level's `load_pair`; for what may be used here see there.
#pragma once

#include "fetch.h"
#include "linear.h"
#include "transpose_impl.h"
#include "vec_math.h"

namespace mc {
namespace {

constexpr int kTileW = Vec::kManyRegisters ? 4 : 2;  // times kTileX accumulators
constexpr int64_t kPair = 2 * Vec::kWidth;

// Where element i of a row goes (see linear.h): levels differ in the width of what they take apart.
template <bool kEvenFirst>
inline int64_t place(int64_t i) {
    if constexpr (!kEvenFirst) return i;
    return i / kPair * kPair + i % 2 * Vec::kWidth + i % kPair / 2;
}

template <class T, bool kEvenFirst>
void widen(const WidenRow& a) {
    float buffer[Vec::kWidth];
    Vec squares = Vec::all(0.0f);
    auto each = [&](auto&& body) {
        for (int64_t i = 0; i < a.n; i += Vec::kWidth) {
            const int64_t left = a.n - i < Vec::kWidth ? a.n - i : Vec::kWidth;
            const char* p = a.x + i * T::kBytes;
            body(i, left, left == Vec::kWidth ? Vec::load(T{}, p) : Vec::load_part(T{}, p, static_cast<int>(left)));
        }
    };
    float scale = 1.0f;
    if (a.gain) {
        each([&](int64_t, int64_t, Vec x) { squares = fmadd(x, x, squares); });
        scale = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(a.n) + a.eps);
    }
    each([&](int64_t i, int64_t left, Vec x) {
        Vec y = mul(x, Vec::all(scale));
        if (a.gain) {
            const char* gain = reinterpret_cast<const char*>(a.gain + i);
            const bool whole = left == Vec::kWidth;
            y = mul(y, whole ? load(a.gain + i) : Vec::load_part(F32{}, gain, static_cast<int>(left)));
        }
        if (!kEvenFirst && left == Vec::kWidth) return store(a.out + i, y);
        store(buffer, y);
        for (int64_t j = 0; j < left; ++j) a.out[place<kEvenFirst>(i + j)] = buffer[j];
    });
    for (int64_t i = a.n; i < a.padded; ++i) a.out[place<kEvenFirst>(i)] = 0.0f;
}

// kW rows of W by kX rows of x, unsummed: out[j * kWidth + i]. kFetch: `ahead` on is fetched meanwhile.
template <class T, int kW, int kX, bool kFetch>
inline void tile(const DotRows& a, const char* w, const float* x, const char* ahead, Vec* out) {
    constexpr int64_t kPairBytes = kPair * T::kBytes;
    Vec acc[kX][kW];
    MC_UNROLL for (int j = 0; j < kX; ++j) {
        MC_UNROLL for (int i = 0; i < kW; ++i) acc[j][i] = Vec::all(0.0f);
    }
    auto add_products = [&](const char* const* rows, int64_t at) {
        MC_UNROLL for (int i = 0; i < kW; ++i) {
            Vec first, second;
            load_pair(T{}, rows[i], first, second);
            MC_UNROLL for (int j = 0; j < kX; ++j) {
                acc[j][i] = fmadd(first, load(x + j * a.padded + at), acc[j][i]);
                acc[j][i] = fmadd(second, load(x + j * a.padded + at + Vec::kWidth), acc[j][i]);
            }
        }
    };
    const int64_t whole = a.n / kPair * kPair;
    const char* rows[kW];
    for (int64_t e = 0; e < whole; e += kPair) {
        if (kFetch) ahead = fetch<kW * kPairBytes>(ahead);
        MC_UNROLL for (int i = 0; i < kW; ++i) rows[i] = w + i * a.w_step + e * T::kBytes;
        add_products(rows, e);
    }
    if (whole < a.n) {
        char rest[kW][kPairBytes] = {};
        MC_UNROLL for (int i = 0; i < kW; ++i) {
            const char* from = w + i * a.w_step + whole * T::kBytes;
            __builtin_memcpy(rest[i], from, static_cast<size_t>((a.n - whole) * T::kBytes));
            rows[i] = rest[i];
        }
        add_products(rows, whole);
    }
    MC_UNROLL for (int j = 0; j < kX; ++j) {
        MC_UNROLL for (int i = 0; i < kW; ++i) out[j * Vec::kWidth + i] = acc[j][i];
    }
}

// kX rows of x by at most kWidth rows of W, summed a vector of rows at a time.
template <class T, int kX>
inline void strip(const DotRows& a, int64_t first, int64_t n, const float* x, float* out) {
    constexpr int kRows = kX == 1 ? 1 : kTileW;
    const Ahead ahead(a.w, a.next, a.w_rows, kRows, a.w_step);
    Vec acc[kX * Vec::kWidth];
    for (Vec& v : acc) v = Vec::all(0.0f);
    int64_t i = 0;
    for (; i + kRows <= n; i += kRows) {
        const int64_t row = first + i;
        if (kX > 1 || a.fetch) {
            tile<T, kRows, kX, true>(a, a.w + row * a.w_step, x, ahead.of(row), acc + i);
        } else {
            tile<T, kRows, kX, false>(a, a.w + row * a.w_step, x, nullptr, acc + i);
        }
    }
    for (; i < n; ++i) tile<T, 1, kX, false>(a, a.w + (first + i) * a.w_step, x, nullptr, acc + i);
    for (int j = 0; j < kX; ++j) store(out + j * kColumns + first, sums(acc + j * Vec::kWidth));
}

template <class T>
void dot(const DotRows& a) {
    for (int64_t first = 0; first < a.w_rows; first += Vec::kWidth) {
        const int64_t n = a.w_rows - first < Vec::kWidth ? a.w_rows - first : Vec::kWidth;
        for (int64_t j = 0; j < a.x_rows; j += kTileX) {
            const float* x = a.x + j * a.padded;
            float* out = a.out + j * kColumns;
            switch (a.x_rows - j) {
                case 1: strip<T, 1>(a, first, n, x, out); break;
                case 2: strip<T, 2>(a, first, n, x, out); break;
                case 3: strip<T, 3>(a, first, n, x, out); break;
                default: strip<T, kTileX>(a, first, n, x, out);
            }
        }
    }
}

// Outputs [i, i + n); kWhole: a whole vector of them.
template <class T, bool kWhole>
inline void finish_part(const FinishRow& a, int64_t i, int n) {
    const auto part = [&](auto type, const char* p) {
        if constexpr (kWhole) {
            return Vec::load(type, p);
        } else {
            return Vec::load_part(type, p, n);
        }
    };
    const auto floats = [&](const float* p) { return part(F32{}, reinterpret_cast<const char*>(p + i)); };
    Vec y = floats(a.y);
    if (a.bias) y = add(y, floats(a.bias));
    if (a.up) {
        Vec up = floats(a.up);
        if (a.up_bias) up = add(up, floats(a.up_bias));
        y = mul(silu(y), up);
    }
    if (a.residual) y = add(y, part(T{}, a.residual + i * T::kBytes));
    char* out = a.out + i * T::kBytes;
    kWhole ? Vec::store(T{}, out, y) : Vec::store_part(T{}, out, n, y);
}

template <class T>
void finish(const FinishRow& a) {
    int64_t i = 0;
    for (; i + Vec::kWidth <= a.n; i += Vec::kWidth) finish_part<T, true>(a, i, Vec::kWidth);
    if (i < a.n) finish_part<T, false>(a, i, static_cast<int>(a.n - i));
}

LinearOps linear_table(const char* name) {
    return {name,
            {{widen<F32, false>, widen<F32, true>},
             {widen<F16, false>, widen<F16, true>},
             {widen<BF16, false>, widen<BF16, true>}},
            {dot<F32>, dot<F16>, dot<BF16>},
            {finish<F32>, finish<F16>, finish<BF16>},
            to_bytes,
            dot_packed,
            {kFourBitRows, kEightBitRows},
            transpose,
            nullptr,
            nullptr};
}

}  // namespace
}  // namespace mc
