// The primitives of gist_pool, written once over a vector type and compiled once per instruction set.
//
// Included by gist_<level>.cpp after vec_<level>.h; for what may be used here see there.
#pragma once

#include "vec_math.h"
#include "gist.h"

namespace mc {
namespace {

constexpr int64_t kWidth = Vec::kWidth, kPair = 2 * Vec::kWidth;
constexpr float kRmsEps = 1e-12f;  // mc_kernels/gist_pool/ref.py
constexpr int kPoolPairs = 4;      // accumulators of the weighted sum: twice as many vectors
// Tiles of the residual's product: accumulators stay in registers, and chains of additions are long enough to overlap.
constexpr int kTileRows = 6, kTilePairs = Vec::kManyRegisters ? 2 : 1, kRowPairs = Vec::kManyRegisters ? 8 : 4;

inline Pair nothing() { return {Vec::all(0.0f), Vec::all(0.0f)}; }

// Up to a vector's elements, n of them.
template <class T>
inline Vec load_some(const char* p, int64_t n) {
    return n >= kWidth ? Vec::load(T{}, p) : Vec::load_part(T{}, p, static_cast<int>(n));
}

template <class T>
inline void store_some(char* p, int64_t n, Vec x) {
    if (n >= kWidth) {
        Vec::store(T{}, p, x);
    } else {
        Vec::store_part(T{}, p, static_cast<int>(n), x);
    }
}

inline void fetch(const char* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
}

// dot += x . w, and square += x . x if kSquare, over one key or value.
template <class T, bool kSquare>
inline void multiply(const char* x, int64_t dims, const float* w, Pair& dot, Pair& square) {
    int64_t d = 0;
    for (; d + kPair <= dims; d += kPair) {
        const Pair p = load_pair(T{}, x + d * T::kBytes);
        dot.first = fmadd(p.first, load(w + d), dot.first);
        dot.second = fmadd(p.second, load(w + d + kWidth), dot.second);
        if constexpr (kSquare) {
            square.first = fmadd(p.first, p.first, square.first);
            square.second = fmadd(p.second, p.second, square.second);
        }
    }
    for (; d < dims; d += kWidth) {
        const Vec p = load_some<T>(x + d * T::kBytes, dims - d);
        dot.first = fmadd(p, load(w + d), dot.first);
        if constexpr (kSquare) square.first = fmadd(p, p, square.first);
    }
}

// x_j . w of all entries, and their x_j . x_j if kSquare.
template <class T, bool kSquare>
inline void scores(const PoolBlock& a, const float* w, float* dots, float* squares) {
    for (int64_t e = 0; e < a.count; e += kWidth) {
        Vec dot_of[kWidth], square_of[kWidth];
        const int64_t n = a.count - e < kWidth ? a.count - e : kWidth;
        for (int64_t i = 0; i < n; ++i) {
            const int64_t slot = a.rows.slots[e + i];
            Pair dot = nothing(), square = nothing();
            multiply<T, kSquare>(a.rows.k + slot * a.k_step, a.dims, w, dot, square);
            multiply<T, kSquare>(a.rows.v + slot * a.v_step, a.dims, w + padded(a.dims), dot, square);
            dot_of[i] = add(dot.first, dot.second);
            if constexpr (kSquare) square_of[i] = add(square.first, square.second);
        }
        for (int64_t i = n; i < kWidth; ++i) dot_of[i] = square_of[i] = Vec::all(0.0f);
        store(dots + e, sums(dot_of));
        if constexpr (kSquare) store(squares + e, sums(square_of));
    }
}

// p from dot products to 2^(logit - greatest); returns their sum. A NaN reaches it.
inline float soften(float* p, const float* inv_rms, const float* b, int64_t n) {
    Vec most = Vec::all(-__builtin_inff()), total = Vec::all(0.0f);
    for (int64_t e = 0; e < n; e += kWidth) {
        const Vec x = fmadd(load(p + e), load(inv_rms + e), load(b + e));
        store(p + e, x);
        most = greater(x, most);
    }
    const Vec top = Vec::all(greatest(most)), unit = Vec::all(kLog2E);
    for (int64_t e = 0; e < n; e += kWidth) {
        const Vec x = exp2(mul(sub(load(p + e), top), unit));
        store(p + e, x);
        total = add(total, x);
    }
    return sum(total);
}

// The keys or the values of a block, and what is fetched meanwhile: those of the next one, or NULL.
struct Part {
    const char* rows;
    int64_t step;
    const char* next;
    const int64_t* next_slots;
};

// out[d ..] = scale * sum_j p_j x_j[d ..] in kPairs pairs of vectors.
template <class T, int kPairs>
inline void gather(const PoolBlock& a, const Part& x, const float* p, float scale, int64_t d, float* out) {
    const char* next = d == 0 ? x.next : nullptr;
    Pair acc[kPairs];
    for (int i = 0; i < kPairs; ++i) acc[i] = nothing();
    for (int64_t j = 0; j < a.count; ++j) {
        const char* row = x.rows + a.rows.slots[j] * x.step + d * T::kBytes;
        if (next) fetch(next + x.next_slots[j] * x.step, a.dims * T::kBytes);
        const Vec weight = Vec::all(p[j]);
        for (int i = 0; i < kPairs; ++i) {
            const Pair value = load_pair(T{}, row + i * kPair * T::kBytes);
            acc[i].first = fmadd(weight, value.first, acc[i].first);
            acc[i].second = fmadd(weight, value.second, acc[i].second);
        }
    }
    for (int i = 0; i < kPairs; ++i) {
        const Pair y = in_order(T{}, acc[i]);
        store(out + d + i * kPair, mul(y.first, Vec::all(scale)));
        store(out + d + i * kPair + kWidth, mul(y.second, Vec::all(scale)));
    }
}

template <class T>
inline void gather_part(const PoolBlock& a, const Part& x, const float* p, float scale, float* out) {
    int64_t d = 0;
    for (; d + kPoolPairs * kPair <= a.dims; d += kPoolPairs * kPair) gather<T, kPoolPairs>(a, x, p, scale, d, out);
    for (; d + 2 * kPair <= a.dims; d += 2 * kPair) gather<T, 2>(a, x, p, scale, d, out);
    for (; d + kPair <= a.dims; d += kPair) gather<T, 1>(a, x, p, scale, d, out);
    for (; d < a.dims; d += kWidth) {
        Vec acc = Vec::all(0.0f);
        for (int64_t j = 0; j < a.count; ++j) {
            const char* row = x.rows + a.rows.slots[j] * x.step + d * T::kBytes;
            acc = fmadd(Vec::all(p[j]), load_some<T>(row, a.dims - d), acc);
        }
        store(out + d, mul(acc, Vec::all(scale)));
    }
}

// Of all entries: x . x becomes 1 / rms(x).
inline void rms_to_inverse(const PoolBlock& a, float* x) {
    const float share = 1.0f / static_cast<float>(2 * a.dims);
    for (int64_t e = 0; e < (a.count + kWidth - 1) / kWidth * kWidth; ++e) {
        x[e] = 1.0f / __builtin_sqrtf(x[e] * share + kRmsEps);
    }
}

template <class T>
void pool(const PoolBlock& a) {
    const int64_t entries = padded(a.count), part = padded(a.dims), y_step = gist_step(a.dims);
    float *inv_rms = a.scores, *p = inv_rms + entries;
    for (int64_t g = 0; g < a.gists; ++g) {
        if (g == 0) {
            scores<T, true>(a, a.w, p, inv_rms);
        } else {
            scores<T, false>(a, a.w + g * 2 * part, p + g * entries, nullptr);
        }
    }
    rms_to_inverse(a, inv_rms);
    Part keys{a.rows.k, a.k_step, a.next.k, a.next.slots}, values{a.rows.v, a.v_step, a.next.v, a.next.slots};
    for (int64_t g = 0; g < a.gists; ++g, p += entries) {
        const float total = soften(p, inv_rms, a.b + g * entries, (a.count + kWidth - 1) / kWidth * kWidth);
        float* y = a.y + g * y_step;
        gather_part<T>(a, keys, p, 1.0f / total, y);  // may write beyond the key: the value comes after
        gather_part<T>(a, values, p, 1.0f / total, y + a.dims);
        keys.next = values.next = nullptr;
    }
}

// out[i, at ..] = product + y[i, at ..] + c[at ..]
inline void add_rest(const Residual& a, Pair product, int64_t i, int64_t at) {
    const float* from = a.y + i * a.step + at;
    float* to = a.out + i * a.step + at;
    store(to, add(add(product.first, load(from)), load(a.c + at)));
    store(to + kWidth, add(add(product.second, load(from + kWidth)), load(a.c + at + kWidth)));
}

// Rows [i, i + kRows) and kPairs pairs of columns from e on.
template <class T, int kRows, int kPairs>
inline void product(const Residual& a, int64_t i, int64_t e) {
    Pair acc[kRows][kPairs];
    for (int r = 0; r < kRows; ++r) {
        for (int x = 0; x < kPairs; ++x) acc[r][x] = nothing();
    }
    const float* y = a.y + i * a.step;
    const char* m = a.m + e * T::kBytes;
    for (int64_t d = 0; d < a.width; ++d, m += a.m_step) {
        Pair column[kPairs];
        for (int x = 0; x < kPairs; ++x) column[x] = load_pair(T{}, m + x * kPair * T::kBytes);
        for (int r = 0; r < kRows; ++r) {
            const Vec factor = Vec::all(y[r * a.step + d]);
            for (int x = 0; x < kPairs; ++x) {
                acc[r][x].first = fmadd(factor, column[x].first, acc[r][x].first);
                acc[r][x].second = fmadd(factor, column[x].second, acc[r][x].second);
            }
        }
    }
    for (int r = 0; r < kRows; ++r) {
        for (int x = 0; x < kPairs; ++x) {
            add_rest(a, in_order(T{}, acc[r][x]), i + r, e + x * kPair);
        }
    }
}

// The last columns, fewer than a pair.
template <class T>
inline void product_rest(const Residual& a, int64_t i, int64_t e) {
    for (; e < a.width; e += kWidth) {
        const float* y = a.y + i * a.step;
        const char* m = a.m + e * T::kBytes;
        Vec acc = Vec::all(0.0f);
        for (int64_t d = 0; d < a.width; ++d, m += a.m_step) {
            acc = fmadd(Vec::all(y[d]), load_some<T>(m, a.width - e), acc);
        }
        store(a.out + i * a.step + e, add(add(acc, load(y + e)), load(a.c + e)));
    }
}

template <class T>
void residual(const Residual& a) {
    int64_t i = 0;
    for (; i + kTileRows <= a.n; i += kTileRows) {
        int64_t e = 0;
        for (; e + kTilePairs * kPair <= a.width; e += kTilePairs * kPair) product<T, kTileRows, kTilePairs>(a, i, e);
        for (; e + kPair <= a.width; e += kPair) product<T, kTileRows, 1>(a, i, e);
        for (int r = 0; r < kTileRows; ++r) product_rest<T>(a, i + r, e);
    }
    for (; i < a.n; ++i) {
        int64_t e = 0;
        for (; e + kRowPairs * kPair <= a.width; e += kRowPairs * kPair) product<T, 1, kRowPairs>(a, i, e);
        for (; e + 4 * kPair <= a.width; e += 4 * kPair) product<T, 1, 4>(a, i, e);
        for (; e + kPair <= a.width; e += kPair) product<T, 1, 1>(a, i, e);
        product_rest<T>(a, i, e);
    }
}

template <class T>
void arrange(const float* in_order, int64_t dims, float* out) {
    int64_t d = 0;
    for (; d + kPair <= dims; d += kPair) {
        const Pair x = as_loaded(T{}, Pair{load(in_order + d), load(in_order + d + kWidth)});
        store(out + d, x.first);
        store(out + d + kWidth, x.second);
    }
    for (; d < padded(dims); ++d) out[d] = d < dims ? in_order[d] : 0.0f;
}

template <class T>
void store_row(const float* src, int64_t n, char* dst) {
    for (int64_t i = 0; i < n; i += kWidth) {
        const Vec x = load_some<F32>(reinterpret_cast<const char*>(src + i), n - i);
        store_some<T>(dst + i * T::kBytes, n - i, x);
    }
}

template <class T>
void widen(const char* src, int64_t n, float* dst) {
    for (int64_t i = 0; i < n; i += kWidth) {
        store_some<F32>(reinterpret_cast<char*>(dst + i), n - i, load_some<T>(src + i * T::kBytes, n - i));
    }
}

[[maybe_unused]] GistOps gist_table(const char* name) {
    return {name,
            {pool<F32>, pool<F16>, pool<BF16>},
            {arrange<F32>, arrange<F16>, arrange<BF16>},
            {store_row<F32>, store_row<F16>, store_row<BF16>},
            {residual<F32>, residual<F16>, residual<BF16>},
            {widen<F32>, widen<F16>, widen<BF16>},
            nullptr,
            nullptr};
}

}  // namespace
}  // namespace mc
