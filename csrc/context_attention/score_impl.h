// Scores of few queries for the usual shapes of heads: a key turns on its way through the registers, and everything
// about its row is known to the compiler (a loop of unknown length around the prefetch alone costs a third of the time).
//
// Included by attend_impl.h.
#pragma once

#include "attend.h"
#include "vec_math.h"

namespace mc {
namespace {

constexpr int kFewRows = 4;                         // queries whose products stay in registers
constexpr int kKeys = Vec::kManyRegisters ? 4 : 2;  // keys at a time that share a load of the queries

template <int kBytes>
inline void fetch_row(const char* row) {
    for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(row + i, 0, 2);
}

// kWidth scores of each of kRows queries, into column e of p (beyond the last entry: of nothing in particular). kDims
// dimensions, all of which turn.
template <class T, bool kInterleaved, int kDims, int kRows>
void score_strip(const HeadBlock& a, int64_t e) {
    constexpr int kTurned = kInterleaved ? kDims : kDims / 2;
    Vec products[kRows][Vec::kWidth];
    for (int group = 0; group < Vec::kWidth; group += kKeys) {
        const char* row[kKeys];
        const float* phase[kKeys];
        for (int i = 0; i < kKeys; ++i) {
            const int64_t entry = e + group + i, slot = a.entries->slot[entry];
            fetch_row<kDims * T::kBytes>(a.v + slot * a.v_step);
            row[i] = a.k + slot * a.k_step;
            phase[i] = a.phase + entry * 2 * kTurned;
        }
        Vec acc[kKeys][kRows];
        for (int i = 0; i < kKeys; ++i) {
            for (int r = 0; r < kRows; ++r) acc[i][r] = Vec::all(0.0f);
        }
        for (int at = 0; at < kTurned; at += Vec::kWidth) {
            Vec first_q[kRows], second_q[kRows];
            for (int r = 0; r < kRows; ++r) {
                first_q[r] = load(a.q + r * kDims + at);
                if constexpr (!kInterleaved) second_q[r] = load(a.q + r * kDims + kTurned + at);
            }
            for (int i = 0; i < kKeys; ++i) {
                const Vec c = load(phase[i] + at), s = load(phase[i] + kTurned + at);
                const Vec x = Vec::load(T{}, row[i] + at * T::kBytes);
                if constexpr (kInterleaved) {
                    const Vec turned = fmadd(swap_pairs(x), s, mul(x, c));
                    for (int r = 0; r < kRows; ++r) acc[i][r] = fmadd(turned, first_q[r], acc[i][r]);
                } else {
                    const Vec y = Vec::load(T{}, row[i] + (kTurned + at) * T::kBytes);
                    const Vec first = fnmadd(y, s, mul(x, c)), second = fmadd(x, s, mul(y, c));
                    for (int r = 0; r < kRows; ++r) acc[i][r] = fmadd(first, first_q[r], acc[i][r]);
                    for (int r = 0; r < kRows; ++r) acc[i][r] = fmadd(second, second_q[r], acc[i][r]);
                }
            }
        }
        for (int i = 0; i < kKeys; ++i) {
            for (int r = 0; r < kRows; ++r) products[r][group + i] = acc[i][r];
        }
    }
    for (int r = 0; r < kRows; ++r) store(a.p + r * kBlock + e, sums(products[r]));
}

template <class T, bool kInterleaved, int kDims>
inline bool score_rows(const HeadBlock& a) {
    const auto each = [&](auto strip) {
        for (int64_t e = 0; e < a.entries->count; e += Vec::kWidth) strip(a, e);
        return true;
    };
    switch (a.rows) {
        case 1:
            return each(score_strip<T, kInterleaved, kDims, 1>);
        case 2:
            return each(score_strip<T, kInterleaved, kDims, 2>);
        case 3:
            return each(score_strip<T, kInterleaved, kDims, 3>);
        case kFewRows:
            return each(score_strip<T, kInterleaved, kDims, kFewRows>);
        default:
            return false;
    }
}

// All scores of a block whose rows are `whole` (nothing but pairs, which fill vectors); false, and nothing done, where
// its shape is not among those compiled.
template <class T, bool kInterleaved>
inline bool score_few(const HeadBlock& a) {
    switch (a.shape->dims) {
        case 64:
            return score_rows<T, kInterleaved, 64>(a);
        case 128:
            return score_rows<T, kInterleaved, 128>(a);
        default:
            return false;
    }
}

}  // namespace
}  // namespace mc
