// fused_linear with bf16 products, for x and W of bf16: a product adds two neighbours' at a time, nothing is widened.
//
// Included by linear_avx512bf16.cpp after vec_avx512.h. A few rows of W stay in
// the first-level cache while all rows of x meet them; sums across registers are done for a whole vector of outputs at
// a time.
#pragma once

#include "fetch.h"
#include "linear.h"
#include "narrow_impl.h"

namespace mc {
namespace {

constexpr int kTileW = 4;                             // times kTileX: as many accumulators as `sums` takes
constexpr int64_t kStepBytes = kSpan * BF16::kBytes;  // a register
constexpr int64_t kChunk = 32 * kStepBytes;           // of a row: as much of four of W and four of x fits that cache
constexpr int kGroups = kXRows / kTileX;

// kTileW rows of W, and what is fetched while they are read.
struct TileRows {
    const char* at[kTileW];
    const char* next;
};

inline __m512i load_span(const char* p) { return _mm512_loadu_si512(p); }
inline Vec dot(Vec sum, __m512i a, __m512i b) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b))};
}

// acc += products of a tile with kX rows of x, over bytes [from, to) of them and then over what `part` selects behind.
// kLines: of what is read next, fetched at every step, see `fetch`.
template <int kX, int kLines>
inline void tile_pairs(TileRows& w, const char* x, int64_t x_step, int64_t from, int64_t to, __mmask32 part, Vec* sums) {
    Vec acc[kX][kTileW];
    MC_UNROLL for (int j = 0; j < kX; ++j) {
        MC_UNROLL for (int i = 0; i < kTileW; ++i) acc[j][i] = sums[j * kTileW + i];
    }
    auto add_products = [&](const __m512i* rows, int64_t at) {
        MC_UNROLL for (int j = 0; j < kX; ++j) {
            const __m512i by = load_span(x + j * x_step + at);
            MC_UNROLL for (int i = 0; i < kTileW; ++i) acc[j][i] = dot(acc[j][i], rows[i], by);
        }
    };
    __m512i rows[kTileW];
    const char* next = w.next;
    for (int64_t at = from; at < to; at += kStepBytes) {
        next = fetch<64 * kLines>(next);
        MC_UNROLL for (int i = 0; i < kTileW; ++i) rows[i] = load_span(w.at[i] + at);
        add_products(rows, at);
    }
    w.next = next;
    if (part) {
        MC_UNROLL for (int i = 0; i < kTileW; ++i) rows[i] = _mm512_maskz_loadu_epi16(part, w.at[i] + to);
        add_products(rows, to);
    }
    MC_UNROLL for (int j = 0; j < kX; ++j) {
        MC_UNROLL for (int i = 0; i < kTileW; ++i) sums[j * kTileW + i] = acc[j][i];
    }
}

// The fetches of a tile are spread over the groups of rows of x: all four lines of a step by one, fewer by several.
template <int kX>
inline void group_pairs(int lines, TileRows& w, const char* x, int64_t x_step, int64_t from, int64_t to, __mmask32 part,
                        Vec* sums) {
    switch (lines) {
        case 4: return tile_pairs<kX, 4>(w, x, x_step, from, to, part, sums);
        case 2: return tile_pairs<kX, 2>(w, x, x_step, from, to, part, sums);
        case 1: return tile_pairs<kX, 1>(w, x, x_step, from, to, part, sums);
        default: return tile_pairs<kX, 0>(w, x, x_step, from, to, part, sums);
    }
}

// One row of x. Sums across registers are taken for a whole vector of outputs, as of tiles.
template <bool kFetch>
void stream_pairs(const DotPairs& a) {
    static_assert(kColumns % Vec::kWidth == 0);
    const int64_t whole = a.n / kSpan * kStepBytes;
    const __mmask32 rest = (1u << a.n % kSpan) - 1;
    const Ahead ahead(a.w, a.next, a.w_rows, 1, a.w_step);
    for (int64_t first = 0; first < a.w_rows; first += Vec::kWidth) {
        Vec sums_of[Vec::kWidth];
        for (int64_t i = 0; i < Vec::kWidth; ++i) {  // beyond the last row: that row again
            const int64_t number = first + i < a.w_rows ? first + i : a.w_rows - 1;
            const char *row = a.w + number * a.w_step, *next = ahead.of(number);
            Vec acc = Vec::all(0.0f);
            for (int64_t at = 0; at < whole; at += kStepBytes) {
                if constexpr (kFetch) next = fetch<kStepBytes>(next);
                acc = dot(acc, load_span(row + at), load_span(a.x + at));
            }
            if (rest) acc = dot(acc, _mm512_maskz_loadu_epi16(rest, row + whole), load_span(a.x + whole));
            sums_of[i] = acc;
        }
        store(a.out + first, sums(sums_of));
    }
}

void dot_pairs(const DotPairs& a) {
    if (a.x_rows == 1) return a.fetch ? stream_pairs<true>(a) : stream_pairs<false>(a);
    const int64_t whole = a.n / kSpan * kStepBytes;
    const __mmask32 rest = (1u << a.n % kSpan) - 1;
    const int64_t groups = (a.x_rows + kTileX - 1) / kTileX;
    const Ahead ahead(a.w, a.next, a.w_rows, kTileW, a.w_step);
    const int64_t fetchers = groups >= 4 ? 4 : groups >= 2 ? 2 : 1;
    for (int64_t first = 0; first < a.w_rows; first += kTileW) {
        TileRows w;
        for (int64_t i = 0; i < kTileW; ++i) {  // beyond the last row: that row again
            w.at[i] = a.w + (first + i < a.w_rows ? first + i : a.w_rows - 1) * a.w_step;
        }
        w.next = ahead.of(first);
        Vec sums_of[kGroups][kTileX * kTileW];
        for (int64_t g = 0; g < groups; ++g) {
            for (Vec& v : sums_of[g]) v = Vec::all(0.0f);
        }
        int64_t from = 0;
        do {
            const int64_t to = from + kChunk < whole ? from + kChunk : whole;
            const __mmask32 part = to == whole ? rest : 0;
            for (int64_t g = 0; g < groups; ++g) {
                const char* x = a.x + g * kTileX * a.x_step;
                const int lines = static_cast<int>(g < fetchers ? kTileW / fetchers : 0);
                switch (a.x_rows - g * kTileX) {
                    case 1: group_pairs<1>(lines, w, x, a.x_step, from, to, part, sums_of[g]); break;
                    case 2: group_pairs<2>(lines, w, x, a.x_step, from, to, part, sums_of[g]); break;
                    case 3: group_pairs<3>(lines, w, x, a.x_step, from, to, part, sums_of[g]); break;
                    default: group_pairs<kTileX>(lines, w, x, a.x_step, from, to, part, sums_of[g]);
                }
            }
            from = to;
        } while (from < whole);
        for (int64_t g = 0; g < groups; ++g) {
            float y[kTileX * kTileW];
            store(y, sums(sums_of[g]));
            for (int64_t j = 0; j < kTileX && g * kTileX + j < a.x_rows; ++j) {
                __builtin_memcpy(a.out + (g * kTileX + j) * kColumns + first, y + j * kTileW, kTileW * sizeof *y);
            }
        }
    }
}

}  // namespace
}  // namespace mc
