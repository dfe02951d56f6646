// The micro-kernels of matmul.h on vector registers, written once over a step and compiled once per instruction set.
//
// Included by matmul_<level>.cpp after vec_<level>.h; for what may be used here see there. A tile of kRows rows of C and
// kVectors vectors of a panel's columns stays in registers for all steps. A `Step` says how one is done:
//   Operand; splat(p) an element of A in all lanes; load(p) of W; step(a, w, sum)
#pragma once

#include "matmul.h"
#include "unroll.h"

namespace mc {
namespace {

struct FloatStep {
    using Operand = Vec;
    static Vec splat(const char* p) { return Vec::all(*reinterpret_cast<const Unaligned*>(p)); }
    static Vec load(const char* p) { return Vec::load(F32{}, p); }
    static Vec step(Vec a, Vec w, Vec sum) { return fmadd(a, w, sum); }

private:
    typedef float Unaligned __attribute__((aligned(1), may_alias));
};

// Rows r of A as base + odd multiple of the step, times 1, 2, 4 or 8: an address the processor forms in the load.
struct RowSteps {
    int64_t odd[8];
};

template <int kRow>
inline int64_t row_offset(const RowSteps& s) {
    if constexpr (kRow == 0) {
        return 0;
    } else {
        constexpr int kPower = kRow & -kRow;
        return s.odd[kRow / kPower / 2] * kPower;
    }
}

template <class Step, int kVectors, int kRows>
struct Tile {
    Vec sum[kRows][kVectors];

    template <int kRow = 0>
    inline __attribute__((always_inline)) void step(const char* a, const RowSteps& s,
                                                    const typename Step::Operand (&w)[kVectors]) {
        if constexpr (kRow < kRows) {
            const typename Step::Operand x = Step::splat(a + row_offset<kRow>(s));
            for (int v = 0; v < kVectors; ++v) sum[kRow][v] = Step::step(x, w[v], sum[kRow][v]);
            step<kRow + 1>(a, s, w);
        }
    }
};

// A panel is one ascending stream, which the processor sees by itself; asking for it ran slower. So only p.next is
// fetched, a little every step: a burst would wait for memory.
template <class Step, int kVectors, int kRows, bool kFetch>
void multiply_tile(const Product& p, const char* a, const char* w, const char* next, float* c, int64_t n) {
    RowSteps s;
    for (int i = 0; i < 8; ++i) s.odd[i] = (2 * i + 1) * p.a_step;
    Tile<Step, kVectors, kRows> tile;
    MC_UNROLL for (int r = 0; r < kRows; ++r) {
        MC_UNROLL for (int v = 0; v < kVectors; ++v) tile.sum[r][v] = Vec::all(0.0f);
    }
    for (int64_t i = 0; i < p.steps; ++i, a += 4, w += p.w_step) {
        if constexpr (kFetch) {
            __builtin_prefetch(next, 0, 2);
            next += p.next_step;
        }
        typename Step::Operand x[kVectors];
        for (int v = 0; v < kVectors; ++v) x[v] = Step::load(w + v * Vec::kWidth * 4);
        tile.step(a, s, x);
    }
    MC_UNROLL for (int r = 0; r < kRows; ++r, c += p.c_step) {
        MC_UNROLL for (int v = 0; v < kVectors; ++v) {
            char* to = reinterpret_cast<char*>(c + v * Vec::kWidth);
            const int64_t left = n - v * Vec::kWidth;
            if (left >= Vec::kWidth) {
                if (p.add) tile.sum[r][v] = add(tile.sum[r][v], Vec::load(F32{}, to));
                Vec::store(F32{}, to, tile.sum[r][v]);
            } else if (left > 0) {
                const int some = static_cast<int>(left);
                if (p.add) tile.sum[r][v] = add(tile.sum[r][v], Vec::load_part(F32{}, to, some));
                Vec::store_part(F32{}, to, some, tile.sum[r][v]);
            }
        }
    }
}

template <class Step, int kVectors, int kRows>
void multiply_rows(int64_t rows, const Product& p, const char* a, const char* w, const char* next, float* c, int64_t n) {
    if (rows == kRows) {
        if (next) return multiply_tile<Step, kVectors, kRows, true>(p, a, w, next, c, n);
        return multiply_tile<Step, kVectors, kRows, false>(p, a, w, next, c, n);
    }
    if constexpr (kRows > 1) multiply_rows<Step, kVectors, kRows - 1>(rows, p, a, w, next, c, n);
}

// Rows in tiles of equal size, at most kRows; columns in strips of kVectors, or of one where that holds what is left.
template <class Step, int kVectors, int kRows>
void multiply(const Product& p) {
    const int64_t tiles = (p.m + kRows - 1) / kRows;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t first = t * p.m / tiles, rows = (t + 1) * p.m / tiles - first;
        for (int64_t column = 0; column < p.n; column += kVectors * Vec::kWidth) {
            const int64_t left = p.n - column;
            const char *a = p.a + first * p.a_step, *w = p.w + column * 4;
            const char* next = p.next ? p.next + first * p.next_row : nullptr;
            float* c = p.c + first * p.c_step + column;
            if (left > Vec::kWidth) {
                multiply_rows<Step, kVectors, kRows>(rows, p, a, w, next, c, left);
            } else {
                multiply_rows<Step, 1, kRows>(rows, p, a, w, next, c, left);
            }
        }
    }
}

}  // namespace
}  // namespace mc
