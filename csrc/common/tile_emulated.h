// Matrix tiles in portable C++, after Intel's description of each instruction. See tile_amx.h for the real ones.
//
// What the hardware refuses with a fault is an abort here: a tile that is not configured, shapes that do not fit.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "tile_config.h"

namespace mc {
namespace {

inline void expect(bool so) {
    if (!so) std::abort();
}

class Tiles {
public:
    void configure(const TileConfig& c) {
        expect(c.palette == 1 && c.start_row == 0);
        for (int i = 0; i < 8; ++i) {
            expect(c.rows[i] <= 16 && c.row_bytes[i] <= 64 && (c.rows[i] == 0) == (c.row_bytes[i] == 0));
        }
        config_ = c;
        std::memset(data_, 0, sizeof data_);
    }
    static void release() { config_ = TileConfig{}; }

    template <int kTile>
    void zero() {
        expect(config_.rows[kTile] > 0);
        std::memset(data_[kTile], 0, sizeof data_[kTile]);
    }
    template <int kTile>
    void load(const void* p, int64_t step) {
        zero<kTile>();
        for (int r = 0; r < config_.rows[kTile]; ++r) {
            std::memcpy(data_[kTile][r], static_cast<const char*>(p) + r * step, config_.row_bytes[kTile]);
        }
    }
    template <int kTile>
    void store(void* p, int64_t step) {
        expect(config_.rows[kTile] > 0);
        for (int r = 0; r < config_.rows[kTile]; ++r) {
            std::memcpy(static_cast<char*>(p) + r * step, data_[kTile][r], config_.row_bytes[kTile]);
        }
    }
    // Pairs of a row of kA with those of kB: even and odd elements are summed apart, by multiplications and additions
    // rounded once together, then added to each other and to kSum. The product of two bf16 is exact in fp32, so that
    // rounding it first changes nothing.
    template <int kSum, int kA, int kB>
    void multiply() {
        const int rows = config_.rows[kSum], columns = config_.row_bytes[kSum] / 4, pairs = config_.row_bytes[kA] / 4;
        expect(rows > 0 && config_.rows[kA] == rows && config_.rows[kB] == pairs);
        expect(config_.row_bytes[kB] == config_.row_bytes[kSum]);
        for (int m = 0; m < rows; ++m) {
            float sums[16][2] = {};
            for (int k = 0; k < pairs; ++k) {
                for (int n = 0; n < columns; ++n) {
                    for (int half = 0; half < 2; ++half) {
                        const float x = element(data_[kA][m], 2 * k + half), y = element(data_[kB][k], 2 * n + half);
                        const float product = x * y;
                        sums[n][half] = flushed(sums[n][half] + product);
                    }
                }
            }
            for (int n = 0; n < columns; ++n) {
                float c;
                std::memcpy(&c, data_[kSum][m] + 4 * n, 4);
                c = flushed(flushed(c) + flushed(sums[n][0] + sums[n][1]));
                std::memcpy(data_[kSum][m] + 4 * n, &c, 4);
            }
        }
    }

private:
    static float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }

    // Element i of a row of bf16; a subnormal is zero.
    static float element(const uint8_t* row, int i) {
        uint16_t high;
        std::memcpy(&high, row + 2 * i, 2);
        const uint32_t bits = static_cast<uint32_t>(high) << 16;
        float x;
        std::memcpy(&x, &bits, 4);
        return flushed(x);
    }

    // Of a thread, as a processor's are.
    inline static thread_local TileConfig config_;
    inline static thread_local uint8_t data_[8][16][64] = {};
};

}  // namespace
}  // namespace mc
