// Matrix tiles: AMX's own. See tile_emulated.h for the same in C++.
//
// In assembly: GCC's intrinsics name a tile by a literal and take no template argument.
#pragma once

#include <cstdint>

#include "tile_config.h"

namespace mc {
namespace {

struct Tiles {
    void configure(const TileConfig& c) { __asm__ volatile("ldtilecfg %0" ::"m"(c)); }
    static void release() { __asm__ volatile("tilerelease"); }

    template <int kTile>
    void zero() {
        __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
    }
    template <int kTile>
    void load(const void* p, int64_t step) {
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(step), "i"(kTile) : "memory");
    }
    template <int kTile>
    void store(void* p, int64_t step) {
        __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(step), "i"(kTile) : "memory");
    }
    // kSum += kA kB
    template <int kSum, int kA, int kB>
    void multiply() {
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
    }
};

}  // namespace
}  // namespace mc
