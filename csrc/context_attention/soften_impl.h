// The softmax of a tile of queries (ScoreTile of attend.h), a panel's columns at a time.
//
// Included by attend_impl.h. What a query does not see counts as -infinity, so that a row is whole panels.
#pragma once

#include "attend.h"
#include "vec_math.h"

namespace mc {
namespace {

constexpr float kMinusInfinity = -__builtin_inff();
constexpr int kPanelVectors = static_cast<int>(kPanel) / Vec::kWidth;

// power: 2^x for x <= 0, as precisely as T needs it; 0 far below, NaN for NaN. put: a panel's numbers to column e of a row,
// as T (what is read of the row lies ahead of what is written); returns total with what has been written.
template <class T>
struct Kept {
    static Vec power(Vec x) { return exp2(x); }
    static Vec put(float* row, int64_t e, const Vec (&x)[kPanelVectors], Vec total) {
        char* out = reinterpret_cast<char*>(row) + e * T::kBytes;
        for (int i = 0; i < kPanelVectors; ++i, out += Vec::kWidth * T::kBytes) {
            Vec::store(T{}, out, x[i]);
            total = add(total, T::kBytes == 4 ? x[i] : Vec::load(T{}, out));
        }
        return total;
    }
};

// The greatest of a row's first n scores, n a multiple of kPanel, with the bias added to them.
inline float top_of(float* row, int64_t n, const float* bias) {
    Vec most[kPanelVectors];
    for (Vec& m : most) m = Vec::all(kMinusInfinity);
    for (int64_t e = 0; e < n; e += kPanel) {
        for (int i = 0; i < kPanelVectors; ++i) {
            float* at = row + e + i * Vec::kWidth;
            Vec x = load(at);
            if (bias) store(at, x = add(x, load(bias + e + i * Vec::kWidth)));
            most[i] = greater(most[i], x);
        }
    }
    for (int i = 1; i < kPanelVectors; ++i) most[0] = greater(most[0], most[i]);
    return greatest(most[0]);
}

// Hides what row j does not see in its last panel. Returns the columns of those that it sees something of.
inline int64_t hide(const ScoreTile& a, int64_t j, float* row) {
    const int64_t seen = a.seen[j / a.heads], n = (seen + kPanel - 1) / kPanel * kPanel;
    for (int64_t e = seen; e < n; ++e) row[e] = kMinusInfinity;
    return n;
}

template <class Keep>
void soften_tile(const ScoreTile& a) {
    for (int64_t j = 0; j < a.rows; ++j) {
        float* row = a.p + j * a.p_step;
        const int64_t n = hide(a, j, row);
        const float before = a.top[j], here = top_of(row, n, a.bias), top = before > here ? before : here;
        if (before != top) {
            a.top[j] = top;
            if (before != kMinusInfinity) {
                const float shrink = first(exp2(Vec::all(before - top)));
                a.total[j] *= shrink;
                float* out = a.out + j * a.out_step;
                for (int64_t d = 0; d < a.dims; d += Vec::kWidth) store(out + d, mul(load(out + d), Vec::all(shrink)));
            }
        }
        // With nothing seen so far (top -infinity) every term is 0; a NaN, which is not the greatest, reaches the total.
        const Vec base = Vec::all(top == kMinusInfinity ? 0.0f : top);
        Vec total = Vec::all(0.0f), x[kPanelVectors];
        for (int64_t e = 0; e < n; e += kPanel) {
            for (int i = 0; i < kPanelVectors; ++i) x[i] = Keep::power(sub(load(row + e + i * Vec::kWidth), base));
            total = Keep::put(row, e, x, total);
        }
        a.total[j] += sum(total);
        for (Vec& none : x) none = Vec::all(0.0f);
        for (int64_t e = n; e < a.columns; e += kPanel) Keep::put(row, e, x, total);
    }
}

void sum_rows(const ScoreTile& a) {
    for (int64_t j = 0; j < a.rows; ++j) {
        if (a.total[j] == 0.0f) continue;
        float* row = a.p + j * a.p_step;
        const int64_t n = hide(a, j, row);
        const Vec base = Vec::all(a.top[j]), weight = Vec::all(a.total[j]);
        for (int64_t e = 0; e < n; e += Vec::kWidth) {
            Vec x = load(row + e);
            if (a.bias) x = add(x, load(a.bias + e));
            store(a.out + e, fmadd(exp2(sub(x, base)), weight, load(a.out + e)));
        }
    }
}

}  // namespace
}  // namespace mc
