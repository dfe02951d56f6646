// What head_tiles_impl.h does between tiles in portable C++, for tests on emulated tiles. Included after attend_impl.h.
#pragma once

#include <cstring>

#include "attend_impl.h"

namespace mc {
namespace {

struct Steps {
    static float widened(const char* row, int i) {
        return first(Vec::load_part(BF16{}, row + i * BF16::kBytes, 1));
    }
    static void put(float x, uint16_t* out) { Vec::store_part(BF16{}, reinterpret_cast<char*>(out), 1, Vec::all(x)); }

    // Where element i of 32 is with even ones first.
    static int even_first(int i) { return i / 32 * 32 + i % 2 * 16 + i % 32 / 2; }

    static void narrow_query(const float* q, uint16_t* out) {
        for (int i = 0; i < 32; ++i) put(q[i], out + even_first(i));
    }

    template <int kDims>
    static void turn_key(const char* row, const float* phase, uint16_t* out) {
        constexpr int kHalf = kDims / 2;
        for (int i = 0; i < kHalf; ++i) {
            const int at = even_first(i);
            const float x = widened(row, i), y = widened(row, kHalf + i), c = phase[at], s = phase[kHalf + at];
            put(x * c - y * s, out + at);
            put(y * c + x * s, out + kHalf + at);
        }
    }

    static void scores_to_rows(const float* products, int rows, float* p) {
        for (int e = 0; e < 32; ++e) {
            for (int r = 0; r < rows; ++r) p[r * kBlock + e] = products[e * 16 + r];
        }
    }

    static void narrow_weights(const float* p, int64_t n, uint16_t* out) {
        for (int64_t e = 0; e < (n + 31) / 32 * 32; ++e) put(e < n ? p[e] : 0.0f, out + e);
    }

    static void interleave(const char* first, const char* second, uint16_t* low, uint16_t* high) {
        for (int i = 0; i < 32; ++i) {
            uint16_t* to = (i % 8 < 4 ? low : high) + (i / 8 * 4 + i % 4) * 2;
            std::memcpy(to, first + i * BF16::kBytes, sizeof *to);
            std::memcpy(to + 1, second + i * BF16::kBytes, sizeof *to);
        }
    }

    static void add_sums(const float* low, const float* high, float* out) {
        for (int i = 0; i < 32; ++i) out[i] += (i % 8 < 4 ? low : high)[i / 8 * 4 + i % 4];
    }
};

}  // namespace
}  // namespace mc
